import copy

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from tiny_model import tiny_cfg

from lsnet_d2.layers import FixedBatchNorm2d, ModulatedDeformConv
from lsnet_d2.modeling.backbone import build_lsnet_resnet_backbone

DEFORMABLE = {"DEFORM_ON_PER_STAGE": [False, True, True, True], "DEFORM_MODULATED": True}


def build(norm, freeze_at=2, **resnets):
    cfg = tiny_cfg()
    cfg.MODEL.RESNETS.NORM = norm
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res5"]
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    for key, value in resnets.items():
        cfg.MODEL.RESNETS[key] = value
    return build_lsnet_resnet_backbone(cfg, ShapeSpec(channels=3)), cfg


def norms(backbone):
    return {type(m) for m in backbone.modules() if "BatchNorm" in type(m).__name__}


@pytest.mark.parametrize("resnets", [{}, DEFORMABLE], ids=["plain", "deformable"])
def test_statistics_are_fixed_and_affine_parameters_trained(resnets):
    backbone, cfg = build("FixedBN", **resnets)
    assert norms(backbone) == {FixedBatchNorm2d}
    assert cfg.MODEL.RESNETS.NORM == "FixedBN"  # the caller's config is left alone
    frozen = {n.split(".")[0] for n, p in backbone.named_parameters() if not p.requires_grad}
    trained = {n.split(".")[0] for n, p in backbone.named_parameters() if p.requires_grad}
    assert frozen == {"stem", "res2"} and trained == {"res3", "res4", "res5"}

    backbone.train()
    before = {n: b.clone() for n, b in backbone.named_buffers()}
    sum(f.sum() for f in backbone(torch.randn(1, 3, 64, 64)).values()).backward()
    assert all(torch.equal(b, before[n]) for n, b in backbone.named_buffers())
    assert all(p.grad is not None for p in backbone.parameters() if p.requires_grad)


# Published numbers of parameters, without the classifier's 2,049,000
@pytest.mark.parametrize(
    ("resnets", "parameters"),
    [
        ({"DEPTH": 50}, 25_557_032),
        ({"DEPTH": 50, "NUM_GROUPS": 32, "WIDTH_PER_GROUP": 4}, 25_028_904),
        ({"DEPTH": 101, "NUM_GROUPS": 64, "WIDTH_PER_GROUP": 4}, 83_455_272),
    ],
)
def test_numbers_of_parameters(resnets, parameters):
    backbone, _ = build("FixedBN", freeze_at=0, **resnets)
    assert sum(p.numel() for p in backbone.parameters()) == parameters - 2_049_000


def test_norms_of_detectron2():
    assert norms(build("FrozenBN")[0]) == {FrozenBatchNorm2d}
    mixed, _ = build("BN", freeze_at=2)
    assert norms(mixed) == {FrozenBatchNorm2d, torch.nn.BatchNorm2d}
    assert norms(mixed.res2) == {FrozenBatchNorm2d} and norms(mixed.res3) == {torch.nn.BatchNorm2d}


class TestDeformable:
    def test_the_3x3_convolutions_of_its_stages(self):
        backbone, _ = build("FixedBN", **DEFORMABLE, NUM_GROUPS=32, WIDTH_PER_GROUP=4)
        found = {
            name
            for name, module in backbone.named_modules()
            if isinstance(module, ModulatedDeformConv)
        }
        blocks = {"res3": 4, "res4": 6, "res5": 3}
        assert found == {f"{s}.{i}.conv2" for s, n in blocks.items() for i in range(n)}
        first, second = backbone.res3[0].conv2, backbone.res3[1].conv2
        assert (first.stride, second.stride) == (2, 1)
        assert first.groups == 32 and first.weight.shape == (256, 8, 3, 3)
        assert first.bias is None and first.conv_offset.bias is not None
        assert isinstance(first.norm, FixedBatchNorm2d)

    def test_starts_as_the_plain_network_with_half_of_its_3x3_convolutions(self):
        torch.manual_seed(0)
        plain, _ = build("FixedBN")
        torch.manual_seed(0)
        deformable, _ = build("FixedBN", **DEFORMABLE)
        for stage in (plain.res3, plain.res4, plain.res5):
            for block in stage:
                torch.nn.init.constant_(block.conv2.norm.weight, 0.5)
        image = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            expected, out = plain(image), deformable(image)
        for name in out:
            torch.testing.assert_close(out[name], expected[name], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("resnets", "message"),
        [
            ({**DEFORMABLE, "DEFORM_MODULATED": False}, "DEFORM_MODULATED is False"),
            ({**DEFORMABLE, "DEFORM_NUM_GROUPS": 2}, "DEFORM_NUM_GROUPS is 2"),
            ({**DEFORMABLE, "RES5_DILATION": 2}, "RES5_DILATION is 2"),
            ({"DEFORM_ON_PER_STAGE": [True, True]}, r"DEFORM_ON_PER_STAGE is \[True, True\]"),
        ],
    )
    def test_what_is_not_supported(self, resnets, message):
        with pytest.raises(ValueError, match=rf"MODEL\.RESNETS\.{message}"):
            build("FixedBN", **resnets)


@pytest.mark.parametrize("freeze_at", [-1, 6])
def test_stages_to_freeze(freeze_at):
    with pytest.raises(ValueError, match=rf"MODEL\.BACKBONE\.FREEZE_AT is {freeze_at}; .*0 to 5"):
        build("FixedBN", freeze_at)


@pytest.mark.parametrize("resnets", [{}, DEFORMABLE], ids=["plain", "deformable"])
def test_activation_checkpointing_changes_no_number(resnets):
    torch.manual_seed(0)
    plain, _ = build("FixedBN", **resnets)
    for module in plain.modules():
        if isinstance(module, ModulatedDeformConv):
            torch.nn.init.normal_(module.conv_offset.weight, std=0.01)
    saving, _ = build("FixedBN", **resnets, ACTIVATION_CHECKPOINTING=True)
    saving.load_state_dict(plain.state_dict(), strict=True)
    image = torch.randn(2, 3, 64, 96)
    for backbone in (plain, saving, copy.deepcopy(saving)):
        backbone.train()
        saved = []

        def count(tensor, saved=saved):
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            maps = backbone(image)
        loss = sum((m * m).mean() for m in maps.values())
        backbone.zero_grad()
        loss.backward()
        gradients = {n: p.grad for n, p in backbone.named_parameters() if p.grad is not None}
        if backbone is plain:
            expected = maps, gradients, sum(saved)
            continue
        assert all(torch.equal(maps[name], expected[0][name]) for name in maps)
        assert gradients.keys() == expected[1].keys()
        assert all(torch.equal(gradients[name], expected[1][name]) for name in gradients)
        assert sum(saved) < expected[2] / 10
    saving.eval()
    with torch.no_grad():
        maps = saving(image)
    assert all(torch.equal(maps[name], expected[0][name]) for name in maps)


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_activation_checkpointing_is_refused_where_it_would_change_statistics(norm):
    with pytest.raises(ValueError, match=rf"CHECKPOINTING is True and .*NORM is '{norm}'"):
        build(norm, freeze_at=2, ACTIVATION_CHECKPOINTING=True)
    for allowed in ("FrozenBN", "GN"):
        build(allowed, ACTIVATION_CHECKPOINTING=True)


@pytest.mark.parametrize("resnets", [{}, DEFORMABLE], ids=["plain", "deformable"])
def test_mixed_precision(resnets):
    """Autocast gives nearly the same maps, and gradients in single precision."""
    torch.manual_seed(0)
    backbone, _ = build("FixedBN", **resnets, ACTIVATION_CHECKPOINTING=True)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = backbone(image)
    with torch.autocast("cpu", torch.bfloat16):
        maps = backbone(image)
    for name, feature in maps.items():
        difference = (feature.float() - expected[name]).norm() / expected[name].norm()
        assert difference < 0.03, name
    sum(feature.float().mean() for feature in maps.values()).backward()
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32, name
            assert parameter.grad.isfinite().all(), name

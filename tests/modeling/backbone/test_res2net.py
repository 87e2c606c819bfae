import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from tiny_model import tiny_cfg

from lsnet_d2.layers import ModulatedDeformConv
from lsnet_d2.modeling.backbone.res2net import (
    DeepStem,
    Res2NetBlock,
    build_lsnet_res2net_backbone,
)


def make_cfg(**resnets):
    cfg = tiny_cfg()
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    cfg.MODEL.RESNETS.NORM = "FixedBN"
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 26
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    for key, value in resnets.items():
        cfg.MODEL.RESNETS[key] = value
    return cfg


def build(**resnets):
    return build_lsnet_res2net_backbone(make_cfg(**resnets), ShapeSpec(channels=3))


# Of the chained ones, none has a stride.
@pytest.mark.parametrize(("stride", "chained"), [(1, False), (2, False), (1, True)])
def test_block_by_hand(stride, chained):
    """Three splits of four channels: two are filtered, the last one passes by."""
    torch.manual_seed(0)
    block = Res2NetBlock(6, 10, width=4, scales=3, stride=stride, chained=chained, norm="").double()
    x = torch.randn(2, 6, 7, 9, dtype=torch.double)

    a, b, c = F.conv2d(x, block.conv1.weight).relu().split(4, dim=1)
    first = F.conv2d(a, block.convs[0].weight, padding=1, stride=stride).relu()
    if chained:
        b = b + first
    second = F.conv2d(b, block.convs[1].weight, padding=1, stride=stride).relu()
    identity = x
    if stride == 2:
        c = F.avg_pool2d(c, 3, 2, padding=1)
        # cells that reach over the border are averages of what is there
        ones = F.pad(torch.ones(1, 1, 7, 9, dtype=torch.double), (0, 1, 0, 1))
        identity = F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), 2) / F.avg_pool2d(ones, 2)
    out = F.conv2d(torch.cat([first, second, c], dim=1), block.conv3.weight)
    expected = (out + F.conv2d(identity, block.shortcut.weight)).relu()
    torch.testing.assert_close(block(x), expected)


def test_stem():
    torch.manual_seed(0)
    stem = DeepStem(3, 8, norm="")
    image = torch.randn(1, 3, 17, 24)
    x = image
    for conv, stride in ((stem.conv1, 2), (stem.conv2, 1), (stem.conv3, 1)):
        x = F.conv2d(x, conv.weight, stride=stride, padding=1).relu()
    torch.testing.assert_close(stem(image), F.max_pool2d(x, 3, 2, padding=1))
    assert [conv.out_channels for conv in (stem.conv1, stem.conv2, stem.conv3)] == [4, 4, 8]


def test_maps_and_frozen_stages():
    backbone = build(DEPTH=50).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 64, 96))
    sizes = {"res2": (16, 24), "res3": (8, 12), "res4": (4, 6), "res5": (2, 3)}
    assert {name: tuple(m.shape[2:]) for name, m in maps.items()} == sizes
    channels = {"res2": 256, "res3": 512, "res4": 1024, "res5": 2048}
    assert {name: m.shape[1] for name, m in maps.items()} == channels
    frozen = {n.split(".")[0] for n, p in backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"stem", "res2"}


def test_every_split_is_deformable():
    backbone = build(DEPTH=50, DEFORM_ON_PER_STAGE=[False, True, True, True], DEFORM_MODULATED=True)
    for name, stage in zip(("res2", "res3", "res4", "res5"), backbone.stages, strict=True):
        kinds = {type(conv) for block in stage for conv in block.convs}
        assert (kinds == {ModulatedDeformConv}) == (name != "res2")
    assert backbone.res3[0].convs[2].stride == 2 and backbone.res3[1].convs[2].stride == 1


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("DEPTH", 18, "DEPTH is 18; .*50, 101, 152"),
        ("NUM_GROUPS", 2, "NUM_GROUPS is 2; .* must be 1"),
        ("STRIDE_IN_1X1", True, "STRIDE_IN_1X1 is True; .* must be False"),
        ("RES5_DILATION", 2, "RES5_DILATION is 2; .* must be 1"),
    ],
)
def test_what_it_does_not_have(key, value, message):
    with pytest.raises(ValueError, match=rf"MODEL\.RESNETS\.{message}"):
        build(**{key: value})


def test_needs_two_splits():
    cfg = make_cfg()
    cfg.MODEL.RES2NET.SCALES = 1
    with pytest.raises(ValueError, match=r"MODEL\.RES2NET\.SCALES is 1"):
        build_lsnet_res2net_backbone(cfg, ShapeSpec(channels=3))

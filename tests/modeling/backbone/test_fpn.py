import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.utils.events import EventStorage
from tiny_model import make_input, tiny_cfg

BACKBONES = {
    "build_lsnet_resnet_fpn_backbone": ["res3", "res4", "res5"],
    "build_lsnet_efficientnet_lite0_fpn_backbone": ["stride8", "stride16", "stride32"],
}


def make_cfg(name):
    cfg = tiny_cfg()
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = BACKBONES[name]
    cfg.MODEL.FPN.OUT_CHANNELS = 64
    cfg.MODEL.FPN.NORM = "GN"
    return cfg


@pytest.mark.parametrize("name", BACKBONES)
def test_pyramid(name):
    torch.manual_seed(0)
    backbone = build_backbone(make_cfg(name), ShapeSpec(channels=3))
    assert backbone.size_divisibility == 32
    shapes = backbone.output_shape()
    assert {n: s.stride for n, s in shapes.items()} == {f"p{i}": 2**i for i in range(3, 8)}
    image = torch.randn(2, 3, 96, 160)
    features = backbone(image)
    sizes = {"p3": (12, 20), "p4": (6, 10), "p5": (3, 5), "p6": (2, 3), "p7": (1, 2)}
    assert {n: tuple(f.shape[2:]) for n, f in features.items()} == sizes
    assert {f.shape[1] for f in features.values()} == {64}

    # P6 from the last bottom-up feature, P7 from P6: convolution and group norm, no activation
    last = backbone.bottom_up(image)[BACKBONES[name][-1]]
    top = backbone.top_block
    p6 = F.conv2d(last, top.p6.weight, stride=2, padding=1)
    p6 = F.group_norm(p6, 32, top.p6.norm.weight, top.p6.norm.bias)
    torch.testing.assert_close(features["p6"], p6, rtol=1e-4, atol=1e-4)
    p7 = F.conv2d(p6, top.p7.weight, stride=2, padding=1)
    p7 = F.group_norm(p7, 32, top.p7.norm.weight, top.p7.norm.bias)
    torch.testing.assert_close(features["p7"], p7, rtol=1e-4, atol=1e-4)
    assert (p6 < 0).any() and top.p6.bias is None


@pytest.mark.parametrize("name", BACKBONES)
def test_detectron2s_retinanet_trains_on_it(name):
    cfg = make_cfg(name)
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.RETINANET.NUM_CLASSES = 3
    model = build_model(cfg).train()
    with EventStorage():
        losses = model([make_input([[10, 12, 60, 70]], [1])])
    sum(losses.values()).backward()
    grads = [p.grad for p in model.backbone.parameters()]
    assert all(g is not None and g.isfinite().all() for g in grads)


def test_no_features_names_the_key():
    cfg = make_cfg("build_lsnet_resnet_fpn_backbone")
    cfg.MODEL.FPN.IN_FEATURES = []
    with pytest.raises(ValueError, match=r"MODEL\.FPN\.IN_FEATURES is empty"):
        build_backbone(cfg, ShapeSpec(channels=3))


def test_unknown_feature_names_the_key():
    cfg = make_cfg("build_lsnet_resnet_fpn_backbone")
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "stride8"]
    with pytest.raises(ValueError, match=r"MODEL\.FPN\.IN_FEATURES names \['stride8'\]"):
        build_backbone(cfg, ShapeSpec(channels=3))

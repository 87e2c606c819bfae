import torch
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from tiny_model import tiny_cfg

from lsnet_d2.layers import FixedBatchNorm2d
from lsnet_d2.modeling.backbone import build_lsnet_resnet_backbone


def build(norm, freeze_at=2):
    cfg = tiny_cfg()
    cfg.MODEL.RESNETS.NORM = norm
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res5"]
    return build_lsnet_resnet_backbone(cfg, ShapeSpec(channels=3)), cfg


def norms(backbone):
    return {type(m) for m in backbone.modules() if "BatchNorm" in type(m).__name__}


def test_statistics_are_fixed_and_affine_parameters_trained():
    backbone, cfg = build("FixedBN")
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


def test_parameters_of_resnet50():
    backbone, _ = build("FixedBN", freeze_at=0)
    # ResNet-50 has 25,557,032 parameters, 2,049,000 of them in the classifier.
    assert sum(p.numel() for p in backbone.parameters()) == 25_557_032 - 2_049_000


def test_norms_of_detectron2():
    assert norms(build("FrozenBN")[0]) == {FrozenBatchNorm2d}

from .efficientnet import EfficientNetLite0, build_efficientnet_lite0_backbone
from .fpn import (
    LastLevelP6P7Norm,
    build_lsnet_efficientnet_lite0_fpn_backbone,
    build_lsnet_res2net_fpn_backbone,
    build_lsnet_resnet_fpn_backbone,
)
from .res2net import build_lsnet_res2net_backbone
from .resnet import FoldedConv2d, build_lsnet_resnet_backbone

__all__ = [
    "EfficientNetLite0",
    "FoldedConv2d",
    "LastLevelP6P7Norm",
    "build_efficientnet_lite0_backbone",
    "build_lsnet_efficientnet_lite0_fpn_backbone",
    "build_lsnet_res2net_backbone",
    "build_lsnet_res2net_fpn_backbone",
    "build_lsnet_resnet_backbone",
    "build_lsnet_resnet_fpn_backbone",
]

"""LSNet's feature pyramid: P3 to P5 by Detectron2's FPN, P6 and P7 from the last feature."""

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, Backbone
from torch import Tensor, nn

from .efficientnet import build_efficientnet_lite0_backbone
from .res2net import build_lsnet_res2net_backbone
from .resnet import build_lsnet_resnet_backbone


class LastLevelP6P7Norm(nn.Module):
    """P6 and P7 by 3x3 convolutions of stride 2 with a norm and, unlike RetinaNet's, no ReLU.

    Args:
        in_channels: channels of ``in_feature``.
        out_channels: channels of P6 and P7.
        in_feature: the bottom-up feature that P6 is made of.
        norm: a norm of Detectron2's.
    """

    num_levels = 2

    def __init__(self, in_channels: int, out_channels: int, in_feature: str, norm: str) -> None:
        super().__init__()
        self.in_feature = in_feature
        self.p6, self.p7 = (
            Conv2d(
                channels,
                out_channels,
                3,
                stride=2,
                padding=1,
                bias=norm == "",
                norm=get_norm(norm, out_channels),
            )
            for channels in (in_channels, out_channels)
        )
        for conv in (self.p6, self.p7):
            weight_init.c2_xavier_fill(conv)

    def forward(self, feature: Tensor) -> list[Tensor]:
        # Never in bfloat16, where the gradient of a kernel that moves over a map of one cell in
        # steps of two is garbage on CPUs (torch 2.14.1). There is little to compute.
        with torch.autocast(feature.device.type, enabled=False):
            p6 = self.p6(feature.to(self.p6.weight.dtype))
            return [p6, self.p7(p6)]


def build_lsnet_fpn(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """The pyramid over the features ``MODEL.FPN.IN_FEATURES`` of ``bottom_up``.

    Its maps are called "p3" to "p7" for features of strides 8, 16 and 32.

    Raises:
        ValueError: none is named, or one that the backbone does not give.
    """
    in_features = cfg.MODEL.FPN.IN_FEATURES
    out_channels = cfg.MODEL.FPN.OUT_CHANNELS
    shapes = bottom_up.output_shape()
    if not in_features:
        raise ValueError(f"MODEL.FPN.IN_FEATURES is empty; the backbone gives {sorted(shapes)}")
    missing = [name for name in in_features if name not in shapes]
    if missing:
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES names {missing}, but the backbone gives {sorted(shapes)}"
        )
    last = in_features[-1]
    return FPN(
        bottom_up=bottom_up,
        in_features=in_features,
        out_channels=out_channels,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelP6P7Norm(
            shapes[last].channels, out_channels, in_feature=last, norm=cfg.MODEL.FPN.NORM
        ),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


@BACKBONE_REGISTRY.register()
def build_lsnet_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """ResNet or ResNeXt with LSNet's pyramid."""
    return build_lsnet_fpn(cfg, build_lsnet_resnet_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_lsnet_res2net_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Res2Net with LSNet's pyramid."""
    return build_lsnet_fpn(cfg, build_lsnet_res2net_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_lsnet_efficientnet_lite0_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """EfficientNet-Lite0 with LSNet's pyramid."""
    return build_lsnet_fpn(cfg, build_efficientnet_lite0_backbone(cfg, input_shape))

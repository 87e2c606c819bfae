"""Detectron2's ResNets with LSNet's batch norm."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone, build_resnet_backbone

from ...layers import FixedBatchNorm2d

FIXED_NORM = "FixedBN"


def build_lsnet_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """A ResNet; ``MODEL.RESNETS.NORM`` may also be "FixedBN".

    With that the statistics of batch norm are fixed everywhere, weight and bias in the stages that
    ``MODEL.BACKBONE.FREEZE_AT`` freezes only.
    """
    if cfg.MODEL.RESNETS.NORM != FIXED_NORM:
        return build_resnet_backbone(cfg, input_shape)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.RESNETS.NORM = "BN"
    freeze_at, cfg.MODEL.BACKBONE.FREEZE_AT = cfg.MODEL.BACKBONE.FREEZE_AT, 0
    backbone = FixedBatchNorm2d.convert(build_resnet_backbone(cfg, input_shape))
    # backbone.freeze would exchange the norms, and checkpoints lose these parameters
    for module in [backbone.stem, *backbone.stages][: max(freeze_at, 0)]:
        module.requires_grad_(False)
    return backbone

"""Detectron2's FCOS for config files: upstream has it for its Python configs only."""

from typing import Any

import detectron2.modeling
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.meta_arch.fcos import FCOSHead


@META_ARCH_REGISTRY.register()
class FCOS(detectron2.modeling.FCOS):
    """:class:`detectron2.modeling.FCOS`, made from the keys of ``MODEL.FCOS``."""

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        """See Detectron2's."""
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.FCOS
        backbone = build_backbone(cfg)
        shapes = [backbone.output_shape()[name] for name in node.IN_FEATURES]
        return {
            "backbone": backbone,
            "head": FCOSHead(
                input_shape=shapes,
                num_classes=node.NUM_CLASSES,
                conv_dims=[shapes[0].channels] * node.NUM_CONVS,
                norm=node.NORM,
                prior_prob=node.PRIOR_PROB,
            ),
            "head_in_features": list(node.IN_FEATURES),
            "num_classes": node.NUM_CLASSES,
            "center_sampling_radius": node.CENTER_SAMPLING_RADIUS,
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
            "test_score_thresh": node.SCORE_THRESH_TEST,
            "test_topk_candidates": node.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": node.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

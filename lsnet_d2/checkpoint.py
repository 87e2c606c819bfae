"""Checkpoints of the released LSNet code (mmdetection 2) under our names."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from detectron2.config import CfgNode
from torch import Tensor

from .imagenet import (
    BACKBONE_PREFIX,
    first_match,
    has_res2net_names,
    is_counter,
    rename_backbone_key,
    some,
)
from .modeling.branches import build_branches

logger = logging.getLogger(__name__)

_BACKBONE = "backbone."
_CLASS_BIAS = "head.cls_predictor.out.bias"
# Applied in order, each at most once to a key; what no rule renames is refused. The first are for
# convolutions with norm.
_CONV_RULES = [
    (r"\.conv\.(weight|bias|conv_offset\.)", r".0.\1"),
    (r"\.(?:bn|gn)\.", r".1."),
]
_CORNERS = {"tl": "top_left", "br": "bottom_right"}
_CORNER_RULES = [
    (r"^bbox_head\.shared_convs\.", r"head.corners.tower."),
    (r"^bbox_head\.reppoints_sem_out\.", r"head.corners.semantic."),
    (r"^bbox_head\.reppoints_sem_embedding\.", r"head.corners.embedding."),
    *[
        (rf"^bbox_head\.{theirs}", rf"head.corners.{_CORNERS[corner]}.{ours}")
        for corner in _CORNERS
        for theirs, ours in [
            (rf"hem_{corner}\.p1_conv1\.", "pooled.0."),
            (rf"hem_{corner}\.p2_conv1\.", "pooled.1."),
            (rf"hem_{corner}\.p_conv1\.", "joined.0."),
            (rf"hem_{corner}\.p_gn1\.", "joined.1."),
            (rf"hem_{corner}\.conv1\.", "direct.0."),
            (rf"hem_{corner}\.gn1\.", "direct.1."),
            (rf"hem_{corner}\.conv2\.", "fuse."),
            (rf"reppoints_hem_{corner}_score_out\.", "heat."),
            (rf"reppoints_hem_{corner}_offset_out\.", "offset."),
        ]
    ],
]
_HEAD_RULES = [
    *_CORNER_RULES,
    (r"^bbox_head\.cls_convs\.", r"head.cls_tower."),
    (r"^bbox_head\.(\w+)_convs\.", r"head.branches.\1.tower."),
    (r"^bbox_head\.pts_cls_conv\.", r"head.cls_predictor.sample."),
    (r"^bbox_head\.pts_cls_out\.", r"head.cls_predictor.out."),
    (r"^bbox_head\.cls_af_dcn_conv\.0\.", r"head.cls_predictor.fuse."),
    (r"^bbox_head\.cls_feat_conv\.", r"head.cls_predictor.local."),
    (r"^bbox_head\.cls_GN\.", r"head.cls_predictor.norm."),
    (r"^bbox_head\.pts_(\w+)_init_(conv|out)\.", r"head.branches.\1.init_\2."),
    (r"^bbox_head\.pts_(\w+)_refine_conv\.", r"head.branches.\1.refine.sample."),
    (r"^bbox_head\.pts_(\w+)_refine_out\.", r"head.branches.\1.refine.out."),
    (r"^bbox_head\.(\w+)_af_dcn_conv\.0\.", r"head.branches.\1.refine.fuse."),
    (r"^bbox_head\.(\w+)_feat_conv\.", r"head.branches.\1.refine.local."),
    (r"^bbox_head\.(\w+)_GN\.", r"head.branches.\1.refine.norm."),
]
# Levels count from C3: lateral and output convolutions 0, 1, 2 are P3, P4, P5; then P6, P7.
_NECK_RULES = [
    *[(rf"^neck\.lateral_convs\.{i}\.", rf"backbone.fpn_lateral{i + 3}.") for i in range(3)],
    *[(rf"^neck\.fpn_convs\.{i}\.", rf"backbone.fpn_output{i + 3}.") for i in range(3)],
    *[(rf"^neck\.fpn_convs\.{i}\.", rf"backbone.top_block.p{i + 3}.") for i in (3, 4)],
]


def is_released_checkpoint(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of the released code."""
    return any(key.startswith("bbox_head.") for key in state_dict)


def convert_lsnet_checkpoint(state_dict: Mapping[str, Tensor], cfg: CfgNode) -> dict[str, Tensor]:
    """Rename the weights of a released LSNet for the model that ``cfg`` describes.

    Args:
        state_dict: the ``state_dict`` of a checkpoint of the released code. Not modified.
        cfg: config with ``add_lsnet_config``; its task, number of classes and
            ``MODEL.LSNET.REFERENCE_OFFSETS`` must fit the checkpoint.

    Returns:
        Weights by our names; the tensors are shared with the input.

    Raises:
        ValueError: the checkpoint is of another task or number of classes, holds a key that has no
            counterpart here, or two with the same; the message names it.
    """
    names = released_names(state_dict)
    refused = [key for key, name in names.items() if name is None and not is_counter(key)]
    if refused:
        raise ValueError(
            f"{len(refused)} keys of the checkpoint have no counterpart: {some(refused)}"
        )
    twice = [name for name, count in Counter(names.values()).items() if name and count > 1]
    if twice:
        raise ValueError(f"the checkpoint has {len(twice)} weights under two names: {some(twice)}")
    converted = {name: state_dict[key] for key, name in names.items() if name is not None}
    _check_task(converted, cfg)
    if not cfg.MODEL.LSNET.REFERENCE_OFFSETS:
        logger.warning(
            "Weights of the released code were trained with accumulated offset scales: set "
            "MODEL.LSNET.REFERENCE_OFFSETS True to get their results."
        )
    return converted


def released_names(keys: Iterable[str]) -> dict[str, str | None]:
    """Our names of all weights of a released model; None where there is none."""
    keys = list(keys)
    backbone = [key.removeprefix(_BACKBONE) for key in keys if key.startswith(_BACKBONE)]
    res2net = has_res2net_names(backbone)
    return {
        key: None if is_counter(key) else rename_released_key(key, res2net=res2net) for key in keys
    }


def rename_released_key(key: str, *, res2net: bool = False) -> str | None:
    """Our name of a weight of the released code, or None where there is none."""
    if key.startswith("neck."):
        name = first_match(key, _NECK_RULES)
        return name and re.sub(r"\.conv\.", ".", name).replace(".gn.", ".norm.")
    if key.startswith(_BACKBONE):
        name = rename_backbone_key(key.removeprefix(_BACKBONE), res2net=res2net)
        return name and BACKBONE_PREFIX + name
    name = first_match(key, _HEAD_RULES)
    if name and re.search(r"tower\.|^head\.corners\.", name):
        for pattern, replacement in _CONV_RULES:
            name = re.sub(pattern, replacement, name)
    return name


def _check_task(converted: dict[str, Tensor], cfg: CfgNode) -> None:
    expected = {branch.name for branch in build_branches(cfg)}
    found = {key.split(".")[2] for key in converted if key.startswith("head.branches.")}
    if found != expected:
        raise ValueError(
            f"the checkpoint has the landmark branches {sorted(found)}, but MODEL.LSNET.TASK "
            f"{cfg.MODEL.LSNET.TASK!r} needs {sorted(expected)}"
        )
    verified = any(key.startswith("head.corners.") for key in converted)
    if verified != cfg.MODEL.LSNET.CPV:
        raise ValueError(
            f"the checkpoint has {'' if verified else 'no '}corner point verification, but "
            f"MODEL.LSNET.CPV is {cfg.MODEL.LSNET.CPV}"
        )
    if _CLASS_BIAS not in converted:
        raise ValueError("the checkpoint has no classifier: bbox_head.pts_cls_out.bias is missing")
    bias = converted[_CLASS_BIAS]
    if not isinstance(bias, Tensor) or bias.ndim != 1:
        raise ValueError("bbox_head.pts_cls_out.bias has no value for each class")
    num_classes = len(bias)
    if num_classes != cfg.MODEL.LSNET.NUM_CLASSES:
        raise ValueError(
            f"the checkpoint has {num_classes} classes, but MODEL.LSNET.NUM_CLASSES is "
            f"{cfg.MODEL.LSNET.NUM_CLASSES}"
        )

"""Weights of ImageNet classifiers under the names of our backbones.

Torchvision's names of a ResNet or ResNeXt, and mmcv's of a Res2Net, which extend them: the released
LSNet code uses the same below ``backbone.``.
"""

import logging
import re
from collections.abc import Iterable, Mapping

from torch import Tensor

logger = logging.getLogger(__name__)

BACKBONE_PREFIX = "backbone.bottom_up."

# Applied in order, the first that matches to a key; the second list to what the first one gave.
_STAGE_RULES = [(rf"^layer{i}\.", rf"res{i + 1}.") for i in range(1, 5)]
_PLACE_RULES = {
    False: [(r"^conv1\.", r"stem.conv1."), (r"^bn1\.", r"stem.conv1.norm."), *_STAGE_RULES],
    # A Res2Net's stem is a list: convolution, norm and activation three times.
    True: [
        *[(rf"^stem\.{3 * i}\.", rf"stem.conv{i + 1}.") for i in range(3)],
        *[(rf"^stem\.{3 * i + 1}\.", rf"stem.conv{i + 1}.norm.") for i in range(3)],
        *_STAGE_RULES,
    ],
}
_BLOCK_RULES = {
    False: [
        (r"\.bn(\d)\.", r".conv\1.norm."),
        (r"\.downsample\.0\.", r".shortcut."),
        (r"\.downsample\.1\.", r".shortcut.norm."),
    ],
    # Its shortcuts begin with a pooling.
    True: [
        (r"\.bns\.(\d)\.", r".convs.\1.norm."),
        (r"\.bn(\d)\.", r".conv\1.norm."),
        (r"\.downsample\.1\.", r".shortcut."),
        (r"\.downsample\.2\.", r".shortcut.norm."),
    ],
}


def is_imagenet_checkpoint(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of a classifier that :func:`convert_imagenet_weights` knows."""
    return "layer1.0.conv1.weight" in state_dict


def is_counter(key: str) -> bool:
    """Whether a key counts the batches of a norm, which has no effect on fixed statistics."""
    return key.endswith(".num_batches_tracked")


def has_res2net_names(keys: Iterable[str]) -> bool:
    """Whether names of a backbone are a Res2Net's; the same name may mean another layer there."""
    return any(key.startswith("stem.0.") for key in keys)


def rename_backbone_key(key: str, *, res2net: bool = False) -> str | None:
    """Our name of a weight, within the backbone, or None where there is none."""
    name = first_match(key, _PLACE_RULES[res2net])
    return name and (first_match(name, _BLOCK_RULES[res2net]) or name)


def convert_imagenet_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a classifier for a model with our backbone under a pyramid.

    The classifier itself, ``fc``, is left out, which is logged.

    Args:
        state_dict: of torchvision's ``resnet*``, ``resnext*`` and ``wide_resnet*``, or mmcv's
            ``open-mmlab://resnext101_64x4d``, ``open-mmlab://res2net101_v1d_26w_4s`` and their
            like. Not modified.

    Returns:
        Weights by our names; the tensors are shared with the input.

    Raises:
        ValueError: there is a key of no known layer; the message names it.
    """
    res2net = has_res2net_names(state_dict)
    names = {
        key: rename_backbone_key(key, res2net=res2net) for key in state_dict if not is_counter(key)
    }
    classifier = [key for key in names if key.startswith("fc.")]
    unknown = [key for key, name in names.items() if name is None and key not in classifier]
    if unknown:
        raise ValueError(f"{len(unknown)} weights are of no known layer: {some(unknown)}")
    if classifier:
        logger.info("Left out the classifier of the ImageNet weights: %s", ", ".join(classifier))
    return {BACKBONE_PREFIX + name: state_dict[key] for key, name in names.items() if name}


def first_match(key: str, rules: list[tuple[str, str]]) -> str | None:
    """``key`` renamed by the first rule, (pattern, replacement), that matches; None: none does."""
    for pattern, replacement in rules:
        renamed, count = re.subn(pattern, replacement, key, count=1)
        if count:
            return renamed
    return None


def some(names: list[str], limit: int = 5) -> str:
    """The first few of ``names``."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, ..."

"""The skeleton of a data set: names of keypoints, left and right pairs, bones, OKS sigmas."""

from collections.abc import Sequence
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.data.datasets.builtin_meta import (
    COCO_PERSON_KEYPOINT_FLIP_MAP,
    COCO_PERSON_KEYPOINT_NAMES,
    KEYPOINT_CONNECTION_RULES,
)

from ..errors import ConfigError

_SIDES = ("left", "right")
_BONE_COLOR = (102, 204, 255)


def skeleton_metadata(categories: Sequence[dict]) -> dict[str, Any]:
    """What Detectron2's metadata say about keypoints, from a COCO file's ``categories``.

    The names are those under ``keypoints``. Names that differ in "left" and "right" alone are
    pairs. The bones are those of ``skeleton``; where the keypoints are COCO's, Detectron2's.

    Returns:
        ``keypoint_names``, ``keypoint_flip_map``, ``keypoint_connection_rules``; empty where no
        category has keypoints.

    Raises:
        ValueError: categories have different keypoints, a name occurs twice, or a bone leads to
            none; the message names the category.
    """
    with_keypoints = [c for c in categories if c.get("keypoints")]
    if not with_keypoints:
        return {}
    first = with_keypoints[0]
    names = list(first["keypoints"])
    for category in with_keypoints:
        if list(category["keypoints"]) != names:
            raise ValueError(
                f"category {category['name']!r} has other keypoints than {first['name']!r}; "
                "a data set can have one skeleton"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"category {first['name']!r} has two keypoints of the same name")
    if tuple(names) == tuple(COCO_PERSON_KEYPOINT_NAMES):
        rules = list(KEYPOINT_CONNECTION_RULES)
        flip_map = list(COCO_PERSON_KEYPOINT_FLIP_MAP)
    else:
        bones = first.get("skeleton") or []
        if not all(1 <= end <= len(names) for bone in bones for end in bone):
            raise ValueError(
                f"category {first['name']!r} has a bone to a keypoint that it does not have "
                f"(numbers are 1 to {len(names)})"
            )
        rules = [(names[a - 1], names[b - 1], _BONE_COLOR) for a, b in bones]
        flip_map = _pairs(names)
    return {
        "keypoint_names": names,
        "keypoint_flip_map": flip_map,
        "keypoint_connection_rules": rules,
    }


def _pairs(names: list[str]) -> list[tuple[str, str]]:
    left, right = _SIDES
    pairs = ((name, name.replace(left, right)) for name in names if left in name)
    return [(name, other) for name, other in pairs if other in names]


def keypoint_flip_indices(dataset_names: Sequence[str], num_keypoints: int) -> list[int]:
    """Where each keypoint's values come from in a mirrored image.

    Data sets without keypoints may be among the others: their objects have none.

    Args:
        dataset_names: registered data sets that are trained on together.
        num_keypoints: K, of the config.

    Returns:
        K indices.

    Raises:
        ConfigError: none of the data sets has the names of its keypoints in its metadata, they
            differ, or are not K.
    """
    found = {}
    for dataset in dataset_names:
        metadata = MetadataCatalog.get(dataset)
        names = metadata.get("keypoint_names")
        if names:
            found[dataset] = list(names), list(metadata.get("keypoint_flip_map") or [])
    if not found:
        raise ConfigError(
            f"the model has keypoints, but the metadata of {', '.join(dataset_names)} have no "
            "keypoint_names (in a COCO file: 'keypoints' of a category)"
        )
    first, (names, flip_map) = next(iter(found.items()))
    for dataset, skeleton in found.items():
        if skeleton != (names, flip_map):
            raise ConfigError(f"data sets {first} and {dataset} have different keypoints")
    if len(names) != num_keypoints:
        raise ConfigError(
            f"data set {first} has {len(names)} keypoints: set MODEL.LSNET.NUM_KEYPOINTS "
            f"{len(names)} (it is {num_keypoints})"
        )
    mirrored = dict(flip_map) | {right: left for left, right in flip_map}
    return [names.index(mirrored.get(name, name)) for name in names]

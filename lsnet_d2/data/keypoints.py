"""The skeleton of a data set: names of keypoints, left and right pairs, bones, OKS sigmas."""

import logging
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.data import Metadata, MetadataCatalog
from detectron2.data.datasets.builtin_meta import (
    COCO_PERSON_KEYPOINT_FLIP_MAP,
    COCO_PERSON_KEYPOINT_NAMES,
    KEYPOINT_CONNECTION_RULES,
)

from ..errors import ConfigError, UserError

# What a category of a COCO file says about keypoints; the last two are not COCO's own.
SKELETON_KEYS = ("keypoints", "skeleton", "keypoint_flip_map", "keypoint_oks_sigmas")

MAX_COORDINATE = 2**31  # beyond all images; much more does not fit into a float32
_SIDES = ("left", "right")
_SIDE = re.compile(r"(?<![a-z])(left|right)(?![a-z])")  # as a word
_BONE_COLOR = (102, 204, 255)


def skeleton_metadata(categories: Sequence[dict]) -> dict[str, Any]:
    """What Detectron2's metadata say about keypoints, from a COCO file's ``categories``.

    The names are those under ``keypoints``. Names that differ in "left" and "right" alone, in
    capitals or not, are pairs. The bones are those of ``skeleton``; where the keypoints are COCO's,
    Detectron2's. Two keys beyond COCO's are read from the first category that has keypoints:
    ``keypoint_flip_map``, pairs [left name, right name], in place of those that the names tell; and
    ``keypoint_oks_sigmas``, a tolerance for each keypoint.

    Returns:
        ``keypoint_names``, ``keypoint_flip_map``, ``keypoint_connection_rules``, and
        ``keypoint_oks_sigmas`` where the file has them; empty where no category has keypoints.

    Raises:
        ValueError: names are not text, categories have different keypoints, a name occurs twice, a
            bone or a pair leads to none, or the tolerances are not positive numbers, one a
            keypoint; the message names the category.
    """
    with_keypoints = [c for c in categories if c.get("keypoints")]
    if not with_keypoints:
        return {}
    first = with_keypoints[0]
    names = first["keypoints"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"the keypoints of category {first['name']!r} are not a list of names")
    for category in with_keypoints:
        if category["keypoints"] != names:
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
        numbers = range(1, len(names) + 1)
        if not _are_pairs(bones) or not all(end in numbers for bone in bones for end in bone):
            raise ValueError(
                f"category {first['name']!r} has a bone to a keypoint that it does not have "
                f"(numbers are 1 to {len(names)})"
            )
        rules = [(names[int(a) - 1], names[int(b) - 1], _BONE_COLOR) for a, b in bones]
        flip_map = _pairs(names)
    if first.get("keypoint_flip_map") is not None:
        flip_map = _given_pairs(first, names)
    metadata = {
        "keypoint_names": list(names),
        "keypoint_flip_map": flip_map,
        "keypoint_connection_rules": rules,
    }
    sigmas = first.get("keypoint_oks_sigmas")
    if sigmas is not None:
        if not (
            isinstance(sigmas, list)
            and len(sigmas) == len(names)
            and all(is_finite(sigma) and sigma > 0 for sigma in sigmas)
        ):
            raise ValueError(
                f"the keypoint_oks_sigmas of category {first['name']!r} are not "
                f"{len(names)} positive numbers, one a keypoint"
            )
        metadata["keypoint_oks_sigmas"] = list(sigmas)
    return metadata


def check_triples(keypoints: Sequence) -> None:
    """
    Raises:
        ValueError: the keypoints of an annotation are not finite triples x, y, visibility.
    """
    if (
        not isinstance(keypoints, (list, tuple))
        or len(keypoints) % 3
        or not all(map(is_coordinate, keypoints))
    ):
        raise ValueError("its keypoints are not finite triples x, y, visibility")


def as_keypoints(keypoints: object, count: int) -> np.ndarray:
    """Keypoints of an annotation (count, 3) float64: x, y, visibility; zeros if it has none.

    Raises:
        ValueError: they are not finite triples, or others than ``count``.
    """
    if keypoints is None or not len(keypoints):
        return np.zeros((count, 3))
    try:
        array = np.array(keypoints, dtype=np.float64).reshape(-1)
    except (TypeError, ValueError):  # not numbers, or rows of several lengths
        array = np.array([np.nan])
    check_triples(array.tolist())
    if array.size != 3 * count:
        raise ValueError(f"{array.size} numbers of keypoints, not {3 * count}")
    return array.reshape(count, 3)


def is_finite(value: object) -> bool:
    """Whether a value of a JSON file is a number, and finite also as a floating-point number."""
    return isinstance(value, (int, float)) and abs(value) < 1e308


def is_coordinate(value: object) -> bool:
    return is_finite(value) and abs(value) < MAX_COORDINATE


def _are_pairs(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(p, list) and len(p) == 2 for p in value)


def _given_pairs(category: dict, names: list[str]) -> list[tuple[str, str]]:
    pairs = category["keypoint_flip_map"]
    paired = [name for pair in pairs for name in pair] if _are_pairs(pairs) else [None]
    if not all(paired.count(name) == 1 and name in names for name in paired):
        raise ValueError(
            f"the keypoint_flip_map of category {category['name']!r} is not a list of pairs of "
            "its keypoints, each in one pair at most"
        )
    return [(left, right) for left, right in pairs]


def _pairs(names: list[str]) -> list[tuple[str, str]]:
    left, right = _SIDES
    known = {name.lower(): name for name in names}
    if len(known) < len(names):  # capitals tell them apart
        known = {name: name for name in names}
    pairs = ((name, key.replace(left, right)) for key, name in known.items() if left in key)
    return [(name, known[other]) for name, other in pairs if other in known]


def known_keypoint_names(metadata: Metadata, num_keypoints: int) -> list[str]:
    """What the keypoints of an object are called; empty where the metadata do not say.

    Raises:
        UserError: the metadata name another number of keypoints.
    """
    names = list(metadata.get("keypoint_names") or [])
    if names and len(names) != num_keypoints:
        raise UserError(
            f"the metadata of {metadata.get('name', 'the data set')} name {len(names)} "
            f"keypoints, but an object has {num_keypoints}"
        )
    return names


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
    if alone := [n for n in names if n not in mirrored and _SIDE.search(n.lower())]:
        logging.getLogger(__name__).warning(
            "data set %s: keypoints %s have no partner on the other side, and stay what they are "
            "in mirrored images; 'keypoint_flip_map' in its category gives pairs",
            first,
            ", ".join(alone),
        )
    return [names.index(mirrored.get(name, name)) for name in names]

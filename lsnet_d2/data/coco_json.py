"""COCO annotation files: loading them with all that LSNet uses, and adding extreme points."""

import json
import logging
import os
from collections import Counter, defaultdict
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from pycocotools import mask as mask_util

from .annotation_checks import AnnotationError, raise_problems
from .extreme_points import extreme_points, side_midpoints
from .keypoints import check_triples, is_finite, skeleton_metadata
from .polygons import decode_rle, segmentation_to_polygons

logger = logging.getLogger(__name__)

_KEPT = ("id", "iscrowd", "ignore", "bbox", "category_id", "extreme_points")
_NEEDED = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


def read_coco_json(json_file: str | os.PathLike) -> dict[str, Any]:
    """The content of a file with COCO's ``images``, ``annotations`` and ``categories``.

    Raises:
        AnnotationError: see :func:`read_coco_lists`; also when a key that every entry needs is
            missing or has a value of another kind, ids are not unique, or a category is not in the
            list.
    """
    json_file = os.fspath(json_file)
    data = read_coco_lists(json_file)
    for key in _NEEDED:
        entries = data[key]
        raise_problems(json_file, list(entries_lacking_keys(key, entries).values()))
        raise_problems(json_file, _mistyped_values(key, entries))
        counts = Counter(entry["id"] for entry in entries)
        raise_problems(
            json_file, [f"id {i} occurs {n} times in {key!r}" for i, n in counts.items() if n > 1]
        )
    categories = {category["id"] for category in data["categories"]}
    raise_problems(
        json_file,
        [
            f"annotation {a['id']} of image {a['image_id']}: {unknown_category(a)}"
            for a in data["annotations"]
            if a["category_id"] not in categories
        ],
    )
    return data


def read_coco_lists(json_file: str | os.PathLike) -> dict[str, Any]:
    """The content of a file with COCO's three lists, whatever their entries are.

    Raises:
        AnnotationError: see :func:`read_json_object`; or a list is missing.
    """
    data = read_json_object(json_file)
    for key in _NEEDED:
        if not isinstance(data.get(key), list):
            raise AnnotationError(f"{json_file}: not in COCO's format: no list {key!r}")
    return data


def read_json_object(json_file: str | os.PathLike) -> dict[str, Any]:
    """The content of a file of annotations, whatever its keys are.

    Raises:
        AnnotationError: there is no such file, or it is no complete JSON, or no object.
    """
    json_file = os.fspath(json_file)
    try:
        with PathManager.open(json_file, "r") as file:
            data = json.load(file)
    except FileNotFoundError as error:
        raise AnnotationError(f"{json_file}: no such annotation file") from error
    except OSError as error:
        raise AnnotationError(f"{json_file}: {error.strerror or error}") from error
    except ValueError as error:  # of JSON, or of UTF-8
        raise AnnotationError(f"{json_file}: not a complete JSON file: {error}") from error
    except RecursionError as error:
        raise AnnotationError(f"{json_file}: lists within lists without end") from error
    if not isinstance(data, dict):
        raise AnnotationError(f"{json_file}: not in COCO's format: a {type(data).__name__}")
    return data


def entries_lacking_keys(key: str, entries: list) -> dict[int, str]:
    """Positions of the entries of one of COCO's lists that lack a key, and what they lack.

    Args:
        key: "images", "annotations" or "categories".
    """
    problems = {}
    for index, entry in enumerate(entries):
        missing = [n for n in _NEEDED[key] if not isinstance(entry, dict) or n not in entry]
        if missing:
            which = entry.get("id", f"number {index}") if isinstance(entry, dict) else index
            problems[index] = f"entry {which} of {key!r} has no {', '.join(map(repr, missing))}"
    return problems


def _mistyped_values(key: str, entries: list[dict]) -> list[str]:
    """What is wrong with values that the loader itself uses, a line each."""
    problems = [
        f"entry {entry['id']!r} of {key!r}: {name} is {_shown(entry[name])}, not {kind}"
        for entry in entries
        for name, (fits, kind) in _KINDS[key].items()
        if not fits(entry[name])
    ]
    return problems or ids_of_two_kinds(key, entries)


def ids_of_two_kinds(key: str, entries: list[dict]) -> list[str]:
    """A line if some ids are numbers and some are text, which cannot be sorted."""
    if len({isinstance(entry["id"], str) for entry in entries}) < 2:
        return []
    return [f"some ids of {key!r} are numbers and some are text"]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) < 100 else f"{text[:100]}..."


def is_id(value: object) -> bool:
    """Whether a value of a JSON file can be an id: text, or a finite number."""
    return isinstance(value, str) or (is_finite(value) and not isinstance(value, bool))


def _is_file_name(value: object) -> bool:
    if not isinstance(value, str) or not value or "\0" in value:
        return False
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return False
    return True


def _is_size(value: object) -> bool:
    return is_finite(value) and value >= 1


_ID = (is_id, "a number or text")
# Keys of the entries whose values are used before the checks of annotations.
_KINDS = {
    "images": {
        "id": _ID,
        "file_name": (_is_file_name, "the name of a file"),
        "height": (_is_size, "a size in pixels"),
        "width": (_is_size, "a size in pixels"),
    },
    "annotations": {"id": _ID, "image_id": _ID, "category_id": _ID},
    "categories": {"id": _ID, "name": (lambda value: isinstance(value, str), "text")},
}


def unknown_category(annotation: dict) -> str:
    """What messages say of an annotation whose category is not in the file's list."""
    return f"category {annotation['category_id']} is not in the list of categories"


def load_lsnet_json(
    json_file: str | os.PathLike, image_root: str | os.PathLike, dataset_name: str
) -> list[dict]:
    """Load a COCO file as Detectron2's ``load_coco_json`` does, with what LSNet needs besides.

    Annotations keep ``id``, ``ignore`` and ``extreme_points``, and those of which the segmentation
    cannot be used stay objects, with a box. What is to be ignored is a crowd too, as Detectron2's
    mappers know no other. (Detectron2's loader refuses "ignore", drops the rest, and fails over
    errors in the file with messages that do not name it.)

    Args:
        json_file: with ``images``, ``annotations`` and ``categories``.
        image_root: the folder that ``file_name`` starts from.
        dataset_name: its metadata get ``thing_classes`` and
            ``thing_dataset_id_to_contiguous_id``, by ascending category id, and unless they have
            one the skeleton of the categories (:func:`.keypoints.skeleton_metadata`).

    Returns:
        Dataset dicts by ascending image id. Boxes are XYWH_ABS; keypoints are 0.5 more than in the
        file, which has indices of pixels.

    Raises:
        AnnotationError: see :func:`read_coco_json`; also when an RLE is malformed, or the data
            set is registered with other classes.
    """
    data = read_coco_json(json_file)
    contiguous = _set_metadata(dataset_name, data["categories"], json_file)
    by_image = defaultdict(list)
    for annotation in data["annotations"]:
        by_image[annotation["image_id"]].append(annotation)

    dicts, problems = [], []
    for image in sorted(data["images"], key=lambda image: image["id"]):
        objects = []
        for annotation in by_image.pop(image["id"], ()):
            try:
                objects.append(_to_detectron2(annotation, image, contiguous))
            except ValueError as error:
                problems.append(f"annotation {annotation['id']} of {image['file_name']}: {error}")
        dicts.append(
            {
                "file_name": os.path.join(image_root, image["file_name"]),
                "height": image["height"],
                "width": image["width"],
                "image_id": image["id"],
                "annotations": objects,
            }
        )
    raise_problems(os.fspath(json_file), problems)
    if by_image:
        lost = sum(map(len, by_image.values()))
        logger.warning("%s: %d annotations of images that are not in it", json_file, lost)
    logger.info("Loaded %d images in COCO format from %s", len(dicts), json_file)
    return dicts


def register_lsnet_instances(
    name: str,
    json_file: str | os.PathLike,
    image_root: str | os.PathLike,
    metadata: dict[str, Any] | None = None,
) -> None:
    """As Detectron2's ``register_coco_instances``, with :func:`load_lsnet_json` for the loader.

    Args:
        name: of the data set, for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        json_file, image_root: see :func:`load_lsnet_json`; read when the data set is first used.
        metadata: more of it, such as ``thing_colors`` or ``keypoint_names``.
    """
    json_file, image_root = os.fspath(json_file), os.fspath(image_root)
    DatasetCatalog.register(name, lambda: load_lsnet_json(json_file, image_root, name))
    MetadataCatalog.get(name).set(
        json_file=json_file, image_root=image_root, evaluator_type="coco", **(metadata or {})
    )


def coco_extreme_points(
    annotation: dict, height: int, width: int, *, masks: str = "contour"
) -> list[float]:
    """What the released code's files have under ``extreme_points``.

    Args:
        annotation: of a COCO file, of an image of this size.
        masks: how the points of an RLE are found: "contour" goes along its outline; "pixels" takes
            the centres of its pixels in reading order, as the released code does.

    Returns:
        Ten numbers: x, y of the top, left, bottom and right points in pixels of the image, with
        the coordinate along the side rounded down to an integer, and of the box's centre. Without
        a usable segmentation the middles of the box's sides.

    Raises:
        ValueError: the segmentation or the box is malformed.
    """
    box = np.array(annotation["bbox"], dtype=np.float64)
    if box.shape != (4,) or not np.isfinite(box).all():
        raise ValueError(f"its box {annotation['bbox']} is not four finite numbers")
    segmentation = annotation.get("segmentation")
    outline = isinstance(segmentation, dict) and masks == "contour"
    if isinstance(segmentation, dict) and not outline:
        pixels = np.argwhere(decode_rle(segmentation, height, width))[:, ::-1]
        parts = [pixels] if len(pixels) else []
    else:
        parts = segmentation_to_polygons(segmentation, height, width)
    centre = box[:2] + box[2:] / 2
    if parts:
        points = extreme_points(parts, joined=not outline, integer=True)
    else:
        points = side_midpoints(np.concatenate([box[:2], box[:2] + box[2:]]))
    return [*points.reshape(-1).tolist(), *centre.tolist()]


def _set_metadata(name: str, categories: list[dict], json_file: str | os.PathLike) -> dict:
    categories = sorted(categories, key=lambda category: category["id"])
    classes = [category["name"] for category in categories]
    contiguous = {category["id"]: index for index, category in enumerate(categories)}
    metadata = MetadataCatalog.get(name)
    known = metadata.get("thing_classes")
    if known is not None and list(known) != classes:
        raise AnnotationError(
            f"{json_file}: its {len(classes)} categories are not the {len(known)} classes with "
            f"which data set {name} is registered"
        )
    metadata.set(thing_classes=classes, thing_dataset_id_to_contiguous_id=contiguous)
    if metadata.get("keypoint_names") is None:
        try:
            metadata.set(**skeleton_metadata(categories))
        except ValueError as error:
            raise AnnotationError(f"{json_file}: {error}") from error
    return contiguous


def _to_detectron2(annotation: dict, image: dict, contiguous: dict) -> dict:
    result = {key: annotation[key] for key in _KEPT if key in annotation}
    if annotation.get("ignore"):
        result["iscrowd"] = 1
    result["bbox_mode"] = BoxMode.XYWH_ABS
    result["category_id"] = contiguous[annotation["category_id"]]
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), list):
        height, width = image["height"], image["width"]
        mask = decode_rle(segmentation, height, width)
        segmentation = mask_util.encode(np.asfortranarray(mask))
    if segmentation:
        result["segmentation"] = segmentation
    keypoints = annotation.get("keypoints")
    if keypoints:
        check_triples(keypoints)
        result["keypoints"] = [v + 0.5 if i % 3 < 2 else v for i, v in enumerate(keypoints)]
    return result

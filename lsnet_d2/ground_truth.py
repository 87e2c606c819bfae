"""Ground truth of an annotation file as COCO's evaluation wants it."""

import contextlib
import io
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from .data.annotation_checks import AnnotationError, is_region, raise_problems, read_boxes
from .data.coco_json import entries_lacking_keys, read_json_object
from .data.polygons import check_segmentation, read_polygons

logger = logging.getLogger(__name__)


def check_coco_file(path: str) -> None:
    """Find what would stop an evaluation on a file.

    Raises:
        AnnotationError: the file cannot be read, or has no images or categories; an annotation
            lacks a key that nothing can stand in for; boxes are not four finite numbers, or have a
            negative width or height (boxes without an area, or outside of their images, are COCO's
            own, and never found); a segmentation is of no known form, damaged or of another size
            than its image; or annotations differ in how many keypoints they have.
    """
    dataset = read_json_object(path)
    for key in ("images", "categories"):
        if not dataset.get(key) or not isinstance(dataset[key], list):
            raise AnnotationError(f"{path}: {key!r} is missing or empty")
    annotations = dataset.get("annotations", [])
    if not isinstance(annotations, list) or not all(isinstance(a, dict) for a in annotations):
        raise AnnotationError(f"{path}: 'annotations' is not a list of objects")
    raise_problems(path, list(entries_lacking_keys("annotations", annotations).values()))
    sizes = {
        image.get("id"): (image["height"], image["width"])
        for image in dataset["images"]
        if isinstance(image, dict) and {"height", "width"} <= image.keys()
    }
    problems = _box_problems(annotations)
    for index, annotation in enumerate(annotations):
        try:
            check_segmentation(annotation.get("segmentation"), sizes.get(annotation["image_id"]))
        except ValueError as error:
            problems.setdefault(index, str(error))
    raise_problems(
        path,
        [
            f"annotation {annotation['id']} of image {annotation['image_id']}: {problems[index]}"
            for index, annotation in enumerate(annotations)
            if index in problems
        ],
    )
    with_keypoints = [a for a in annotations if a.get("keypoints")]
    for annotation in with_keypoints:
        here, there = len(annotation["keypoints"]), len(with_keypoints[0]["keypoints"])
        if here != there or here % 3:
            raise AnnotationError(
                f"{path}: annotation {annotation['id']} has {here} numbers under 'keypoints', "
                f"annotation {with_keypoints[0]['id']} has {there}; they must be alike, and three "
                "for each keypoint"
            )


def _box_problems(annotations: list[dict]) -> dict[int, str]:
    """By the positions of the annotations."""
    boxes, problems = read_boxes([annotation["bbox"] for annotation in annotations])
    for index in np.flatnonzero((boxes[:, 2:] < 0).any(axis=1)).tolist():
        problems[index] = f"its box {annotations[index]['bbox']} has a negative width or height"
    return problems


def count_keypoints(annotations: list[dict]) -> int:
    """Keypoints, labelled or not, of an object of a data set; 0 if no object has any."""
    return max((len(a.get("keypoints") or ()) for a in annotations), default=0) // 3


def complete_annotations(dataset: dict[str, Any]) -> None:
    """Give annotations what pycocotools needs, in place.

    ``iscrowd`` is 0 where it is missing or null, and ``area`` that of the box, which only sorts
    objects into small, medium and large, and sets the scale of OKS. If some have keypoints, the
    others get ones that are not labelled; ``num_keypoints`` is counted where it is missing. What is
    to be ignored becomes a crowd: pycocotools does not look at ``ignore``.
    """
    dataset.setdefault("info", {})
    annotations = dataset["annotations"]
    without_area = [annotation for annotation in annotations if annotation.get("area") is None]
    for annotation in without_area:
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    if without_area:
        logger.warning(
            "%d annotations have no 'area'; they are sorted into small, medium and large by the "
            "areas of their boxes",
            len(without_area),
        )
    keypoints = count_keypoints(annotations)
    for annotation in annotations:
        annotation["iscrowd"] = int(is_region(annotation))
        if not annotation.get("keypoints"):
            annotation["keypoints"] = [0] * (3 * keypoints)
            annotation["num_keypoints"] = 0
        elif annotation.get("num_keypoints") is None:
            annotation["num_keypoints"] = sum(v > 0 for v in annotation["keypoints"][2::3])


def coco_index(dataset: dict[str, Any]) -> COCO:
    """The contents of an annotation file as an object of pycocotools."""
    coco = COCO()
    coco.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        coco.createIndex()
    return coco


def box_ground_truth(coco: COCO) -> dict[str, Any]:
    """A copy of a data set for box AP."""
    return {**coco.dataset, "annotations": [dict(a) for a in coco.dataset["annotations"]]}


def mask_ground_truth(coco: COCO) -> dict[str, Any]:
    """A copy for mask AP. Objects without a mask become regions to ignore: what is found there is
    neither right nor wrong. Segmentations are those that :func:`check_coco_file` passes."""
    annotations = []
    for annotation in coco.dataset["annotations"]:
        segmentation = annotation.get("segmentation")
        if isinstance(segmentation, dict):
            segmentation = {**segmentation, "size": [int(side) for side in segmentation["size"]]}
        elif segmentation:
            # four numbers would be taken for a box; vertices may be pairs
            polygons = read_polygons(segmentation)
            segmentation = [part.reshape(-1).tolist() for part in polygons if len(part) >= 3]
        if segmentation:
            annotations.append({**annotation, "segmentation": segmentation})
            continue
        x, y, width, height = annotation["bbox"]
        box = [x, y, x + width, y, x + width, y + height, x, y + height]
        annotations.append({**annotation, "segmentation": [box], "iscrowd": 1})
    return {**coco.dataset, "annotations": annotations}


def keypoint_ground_truth(coco: COCO) -> dict[str, Any]:
    """A copy for keypoint AP, with the objects of the classes that have keypoints.

    Within these classes pycocotools ignores objects without labelled keypoints, and what is found
    around them. Classes without keypoints do not enter the mean, whatever is found of them.
    """
    annotations = coco.dataset["annotations"]
    categories = {a["category_id"] for a in annotations if a["num_keypoints"] > 0}
    kept = [dict(a) for a in annotations if a["category_id"] in categories]
    return {**coco.dataset, "annotations": kept}


GROUND_TRUTHS: dict[str, Callable[[COCO], dict[str, Any]]] = {
    "bbox": box_ground_truth,
    "segm": mask_ground_truth,
    "keypoints": keypoint_ground_truth,
}

"""Ground truth of an annotation file as COCO's evaluation wants it."""

import contextlib
import io
import json
import logging
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from .data.annotation_checks import is_region, raise_problems, read_boxes
from .data.polygons import check_form, check_rle
from .errors import UserError

logger = logging.getLogger(__name__)


def check_coco_file(path: str) -> None:
    """
    Raises:
        UserError: there is no such file, or it is no COCO file with images and categories, or
            an annotation lacks a key that nothing can stand in for, or annotations differ in how
            many keypoints they have.
        AnnotationError: boxes are not four finite numbers, or have a negative width or height.
            (Boxes without an area, or outside of their images, are COCO's own, and never found.)
    """
    if not os.path.isfile(path):
        raise UserError(f"no such annotation file: {path}")
    with open(path, encoding="utf-8") as file:
        try:
            dataset = json.load(file)
        except ValueError as error:
            raise UserError(f"{path}: not complete JSON: {error}") from error
    if not isinstance(dataset, dict):
        raise UserError(f"{path}: not a COCO file, which is an object with 'images' and others")
    for key in ("images", "categories"):
        if not dataset.get(key):
            raise UserError(f"{path}: {key!r} is missing or empty")
    annotations = dataset.get("annotations", [])
    if not isinstance(annotations, list) or not all(isinstance(a, dict) for a in annotations):
        raise UserError(f"{path}: 'annotations' is not a list of objects")
    for index, annotation in enumerate(annotations):
        missing = [
            key for key in ("id", "image_id", "category_id", "bbox") if key not in annotation
        ]
        if missing:
            name = annotation.get("id", f"number {index}")
            raise UserError(f"{path}: annotation {name} has no {missing[0]!r}")
    _check_boxes(path, annotations)
    with_keypoints = [a for a in annotations if a.get("keypoints")]
    for annotation in with_keypoints:
        here, there = len(annotation["keypoints"]), len(with_keypoints[0]["keypoints"])
        if here != there or here % 3:
            raise UserError(
                f"{path}: annotation {annotation['id']} has {here} numbers under 'keypoints', "
                f"annotation {with_keypoints[0]['id']} has {there}; they must be alike, and three "
                "for each keypoint"
            )


def _check_boxes(path: str, annotations: list[dict]) -> None:
    boxes, problems = read_boxes([annotation["bbox"] for annotation in annotations])
    for index in np.flatnonzero((boxes[:, 2:] < 0).any(axis=1)).tolist():
        problems[index] = f"its box {annotations[index]['bbox']} has a negative width or height"
    raise_problems(
        path, [f"annotation {annotations[i]['id']}: {problems[i]}" for i in sorted(problems)]
    )


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
    neither right nor wrong.

    Raises:
        UserError: a segmentation is of no known form, or its RLE is damaged or of another size
            than its image.
    """
    annotations = []
    for annotation in coco.dataset["annotations"]:
        segmentation = annotation.get("segmentation")
        image = coco.imgs.get(annotation["image_id"])
        size = (image["height"], image["width"]) if image else None
        try:
            check_form(segmentation, size)
            if isinstance(segmentation, dict) and size:
                check_rle(segmentation, *size)
        except ValueError as error:
            raise UserError(
                f"annotation {annotation['id']} of image {annotation['image_id']}: {error}"
            ) from error
        if isinstance(segmentation, list):
            # four numbers would be taken for a box
            segmentation = [part for part in segmentation if len(part) >= 6]
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

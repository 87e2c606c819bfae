#!/usr/bin/env python
"""Score ground-truth contours as detections: the best mask AP that a number of points allows."""

import argparse
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from tabulate import tabulate
from tqdm import tqdm

from lsnet_d2.data.annotation_checks import is_region, raise_problems, read_boxes
from lsnet_d2.data.coco_json import read_coco_json
from lsnet_d2.data.contours import CONTOUR_METHODS, MAX_POINTS, MIN_POINTS, resample_contour
from lsnet_d2.data.polygons import bounding_box, segmentation_to_outlines
from lsnet_d2.errors import UserError, exit_on_user_error
from lsnet_d2.fast_coco import FastCOCOeval
from lsnet_d2.ground_truth import coco_index, complete_annotations

COLUMNS = ["method", "P", "AP", "AP50", "AP75", "APs", "APm", "APl"]
COLUMNS += ["IOU one part", "IOU several", "IOU of boxes", "ms/object"]


@dataclass(frozen=True, kw_only=True)
class Object:
    """One object to find, with ``rle`` the mask that pycocotools makes of its segmentation."""

    annotation: dict
    parts: list[np.ndarray]
    holes: list[np.ndarray]
    rle: dict


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("annotations", metavar="ANNOTATIONS.json", help="a file in COCO's format")
    parser.add_argument(
        "--num-points",
        nargs="+",
        type=int,
        default=[18, 36, 72],
        metavar="P",
        help=f"points of a contour, {MIN_POINTS} to {MAX_POINTS}",
    )
    parser.add_argument(
        "--method", nargs="+", choices=CONTOUR_METHODS, default=list(CONTOUR_METHODS)
    )
    return parser


def read_objects(json_file: str) -> tuple[COCO, list[Object]]:
    """The ground truth for pycocotools, and the objects in it that are no crowds.

    Annotations without a usable segmentation are left out of both.

    Raises:
        AnnotationError: the file or a segmentation is malformed, or of no image in the file.
    """
    data = read_coco_json(json_file)
    sizes = {image["id"]: (image["height"], image["width"]) for image in data["images"]}
    kept, objects, problems = [], [], []
    for annotation in data["annotations"]:
        try:
            if annotation["image_id"] not in sizes:
                raise ValueError(f"image {annotation['image_id']} is not in the file")
            size = sizes[annotation["image_id"]]
            segmentation = annotation.get("segmentation")
            parts, holes = segmentation_to_outlines(segmentation, *size)
            _, malformed = read_boxes([annotation["bbox"]])
            if malformed:
                raise ValueError(malformed[0])
        except ValueError as error:
            problems.append(f"annotation {annotation['id']}: {error}")
            continue
        if not parts:
            continue
        if isinstance(segmentation, dict):
            rle = segmentation
            if isinstance(rle["counts"], list):
                rle = mask_util.frPyObjects(rle, *size)
        else:
            rle = to_rle(parts, *size)
        annotation = {"area": float(mask_util.area(rle)), **annotation, "segmentation": rle}
        kept.append(annotation)
        if not is_region(annotation):
            objects.append(Object(annotation=annotation, parts=parts, holes=holes, rle=rle))
    raise_problems(json_file, problems)

    dataset = {**data, "annotations": kept}
    complete_annotations(dataset)
    return coco_index(dataset), objects


def to_rle(polygons: list[np.ndarray], height: int, width: int) -> dict:
    """The mask of one object's polygons."""
    flat = [polygon.reshape(-1).tolist() for polygon in polygons]
    return mask_util.merge(mask_util.frPyObjects(flat, height, width))


def score(truth: COCO, objects: list[Object], method: str, num_points: int) -> list:
    """A row of the table."""
    detections, mask_ious, box_ious, seconds = [], [], [], 0.0
    for item in tqdm(objects, desc=f"{method}, {num_points}", unit="objects", disable=None):
        x, y, width, height = item.annotation["bbox"]
        start = time.perf_counter()
        contour = resample_contour(
            item.parts,
            num_points,
            method=method,
            holes=item.holes,
            box=(x, y, x + width, y + height),
        )
        seconds += time.perf_counter() - start
        rle = to_rle([contour], *item.rle["size"])
        mask_ious.append(mask_util.iou([rle], [item.rle], [0]).item())
        boxes = [bounding_box(polygons) for polygons in ([contour], item.parts)]
        corners, sizes = np.split(np.stack(boxes), 2, axis=1)
        ours, theirs = np.concatenate([corners, sizes - corners], axis=1)[:, None]
        box_ious.append(mask_util.iou(ours, theirs, [0]).item())
        keys = {key: item.annotation[key] for key in ("image_id", "category_id")}
        detections.append({**keys, "segmentation": rle, "score": 1.0})

    several = np.array([len(item.parts) > 1 for item in objects])
    mask_ious = np.array(mask_ious)
    return [
        method,
        num_points,
        *average_precisions(truth, detections),
        _mean(mask_ious[~several]),
        _mean(mask_ious[several]),
        _mean(np.array(box_ious)),
        1000 * seconds / len(objects),
    ]


def average_precisions(truth: COCO, detections: list[dict]) -> list[float]:
    """AP, AP50, AP75, and AP of small, medium and large objects; NaN where there are none."""
    evaluation = FastCOCOeval(truth, detections, "segm")
    # every object has its detection, also where there are more than COCO's 100 in an image
    evaluation.params.maxDets = [max(Counter(d["image_id"] for d in detections).values())]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0]  # threshold, recall, class, area
    at = {round(value, 2): i for i, value in enumerate(evaluation.params.iouThrs.tolist())}
    picked = [precision[..., 0], precision[at[0.5], ..., 0], precision[at[0.75], ..., 0]]
    picked += [precision[..., area] for area in (1, 2, 3)]
    return [_mean(values[values > -1]) for values in picked]


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


@exit_on_user_error()
def main() -> None:
    args = get_parser().parse_args()
    for num_points in args.num_points:
        if not MIN_POINTS <= num_points <= MAX_POINTS:
            raise UserError(f"--num-points {num_points} is not {MIN_POINTS} to {MAX_POINTS}")
    truth, objects = read_objects(args.annotations)
    if not objects:
        raise UserError(f"{args.annotations}: no object with a usable segmentation")
    several = sum(len(item.parts) > 1 for item in objects)
    print(f"{args.annotations}: {len(objects)} objects, {several} of them in several parts")
    rows = [score(truth, objects, method, p) for method in args.method for p in args.num_points]
    print(tabulate(rows, COLUMNS, floatfmt=".3f"))


if __name__ == "__main__":
    main()

"""How far predicted landmarks lie from the true ones, which AP does not tell.

**Matching.** As in COCO's evaluation with a threshold of 0.5, once for all landmarks: detections of
an image with a score of at least ``SCORE_FLOOR`` choose by descending score; each takes the free
object of its class whose box overlaps its own most, if their IOU is at least ``MIN_IOU``. Crowds
cannot be taken. What stays without a partner does not count, so read the errors next to the number
of matched objects and to AP.

**Errors** of a matched object, in pixels of the original image and in percent of its size, the
square root of the area of its box. Every object has the same weight in a mean.

- contour: mean of two means, of the distances from the predicted vertices to the true outline, and
  from OUTLINE_SAMPLES points spread evenly over the true outline to the predicted one. The true
  outline is that of all parts of the object and of the holes in them; how it was sampled matters in
  neither direction.
- extreme points: mean distance of the four points to those of the object's segmentation. Objects
  with a box only do not count.
- keypoints: mean distance over the object's labelled keypoints, hidden ones included.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from tabulate import tabulate

from .data.annotation_checks import is_region
from .data.extreme_points import extreme_points
from .data.polygons import segmentation_to_outlines
from .errors import UserError

SCORE_FLOOR = 0.3
MIN_IOU = 0.5
OUTLINE_SAMPLES = 64


@dataclass(frozen=True)
class Detections:
    """Predictions for one image, in its pixels.

    Attributes:
        image_id: as in the annotation file.
        boxes: (N, 4) XYWH.
        scores: (N,).
        categories: (N,), ids of the annotation file.
        landmarks: by field of ``Instances``, each (N, V, 2) or more columns after x, y.
    """

    image_id: int
    boxes: np.ndarray
    scores: np.ndarray
    categories: np.ndarray
    landmarks: dict[str, np.ndarray]


@dataclass(frozen=True)
class TrueObject:
    """What an annotation of a COCO file says about landmarks.

    Attributes:
        annotation: of the file.
        height, width: of its image.
    """

    annotation: dict[str, Any]
    height: int
    width: int

    @property
    def size(self) -> float:
        """Pixels: the square root of the area of the box."""
        return float(np.sqrt(self.annotation["bbox"][2] * self.annotation["bbox"][3]))

    @cached_property
    def outlines(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Of its parts and of the holes in them; none where there is a box only.

        Raises:
            UserError: the segmentation is malformed.
        """
        try:
            return segmentation_to_outlines(
                self.annotation.get("segmentation"), self.height, self.width
            )
        except ValueError as error:
            raise UserError(
                f"annotation {self.annotation['id']} of image {self.annotation['image_id']}: "
                f"{error}"
            ) from error

    @property
    def polygons(self) -> list[np.ndarray]:
        """Outlines of its parts."""
        return self.outlines[0]

    @property
    def keypoints(self) -> np.ndarray:
        """(K, 3): x, y and visibility, 0 for not labelled; (0, 3) without any."""
        keypoints = np.array(self.annotation.get("keypoints") or [], dtype=np.float64)
        # the file has indices of pixels
        return keypoints.reshape(-1, 3) + np.array([0.5, 0.5, 0])


def contour_error(contour: np.ndarray, true: TrueObject) -> float:
    """Pixels, see above; NaN without a segmentation. ``contour`` (P, 2)."""
    if not true.polygons:
        return np.nan
    contour, outlines = contour[:, :2], sum(true.outlines, [])
    there = distance_to_outline(contour, outlines)
    back = distance_to_outline(sample_outline(outlines, OUTLINE_SAMPLES), [contour])
    return (there.mean() + back.mean()) / 2


def extreme_point_error(points: np.ndarray, true: TrueObject) -> float:
    """Pixels, see above; NaN without a segmentation. ``points`` (4, 2)."""
    if not true.polygons:
        return np.nan
    return _distances(points, extreme_points(true.polygons, joined=False)).mean()


def keypoint_error(keypoints: np.ndarray, true: TrueObject) -> float:
    """Pixels, see above; NaN where none is labelled. ``keypoints`` (K, 2 or more)."""
    labelled = true.keypoints[:, 2] > 0
    if not labelled.any():
        return np.nan
    return _distances(keypoints[labelled], true.keypoints[labelled]).mean()


# Field of the predictions: the name in the results, and the error of one object.
LANDMARK_ERRORS: dict[str, tuple[str, Callable[[np.ndarray, TrueObject], float]]] = {
    "pred_contours": ("contour", contour_error),
    "pred_extreme_points": ("extreme_points", extreme_point_error),
    "pred_keypoints": ("keypoints", keypoint_error),
}


@dataclass(frozen=True)
class MeasuredErrors:
    """Errors of one kind of landmark, of the matched objects that have it.

    Attributes:
        categories: (M,), ids of the annotation file.
        pixels, percent: (M,).
    """

    categories: np.ndarray
    pixels: np.ndarray
    percent: np.ndarray


def landmark_errors(coco: COCO, detections: Iterable[Detections]) -> dict[str, MeasuredErrors]:
    """Match detections with annotations and measure every kind of landmark that they have.

    Args:
        coco: annotations with ``iscrowd``.

    Returns:
        By name in LANDMARK_ERRORS, in its order.

    Raises:
        UserError: the segmentation of a matched object is malformed.
    """
    rows: dict[str, list[tuple[int | str, float, float]]] = {}
    for found in detections:
        image = coco.imgs[found.image_id]
        annotations = [a for a in coco.imgToAnns.get(found.image_id, ()) if _can_be_taken(a)]
        measures = [
            (*LANDMARK_ERRORS[field], landmarks)
            for field, landmarks in found.landmarks.items()
            if field in LANDMARK_ERRORS
        ]
        for name, _, _ in measures:
            rows.setdefault(name, [])
        for index, annotation in match(found, annotations):
            true = TrueObject(annotation, image["height"], image["width"])
            for name, measure, landmarks in measures:
                pixels = measure(landmarks[index], true)
                if np.isfinite(pixels):
                    percent = 100 * pixels / true.size
                    rows[name].append((annotation["category_id"], pixels, percent))
    return {
        name: MeasuredErrors(*(np.array([row[i] for row in rows[name]]) for i in range(3)))
        for name, _ in LANDMARK_ERRORS.values()
        if name in rows
    }


def _can_be_taken(annotation: dict) -> bool:
    return not is_region(annotation) and min(annotation["bbox"][2:]) > 0


def match(
    found: Detections,
    annotations: Sequence[dict],
    *,
    score_floor: float = SCORE_FLOOR,
    min_iou: float = MIN_IOU,
) -> list[tuple[int, dict]]:
    """Detections of an image and the objects that they take, as said at the top of this file.

    Returns:
        Pairs of an index into the detections and an annotation, by descending score.
    """
    order = np.argsort(-found.scores, kind="stable")
    order = order[found.scores[order] >= score_floor]
    if not len(order) or not annotations:
        return []
    true_boxes = np.array([a["bbox"] for a in annotations], dtype=np.float64)
    true_categories = np.array([a["category_id"] for a in annotations])
    boxes = found.boxes[order].astype(np.float64)
    overlaps = mask_util.iou(boxes, true_boxes, [0] * len(annotations))
    overlaps[found.categories[order, None] != true_categories] = 0
    pairs = []
    for index, row in zip(order.tolist(), overlaps, strict=True):
        best = int(row.argmax())
        if row[best] >= min_iou:
            pairs.append((index, annotations[best]))
            overlaps[:, best] = 0
    return pairs


def summarize_errors(errors: dict[str, MeasuredErrors], names: dict[int, str]) -> dict[str, float]:
    """Flat results: mean errors and how many objects they are of, overall and by class.

    Args:
        names: of the classes, by their ids in the annotation file.

    Returns:
        For each kind of landmark ``{kind}_px``, ``{kind}_pct`` and ``{kind}_objects``, and for each
        class the same with ``-{class}`` appended, if an object of it was matched. Means over no
        objects are NaN.
    """
    results = {}
    for kind, measured in errors.items():
        everything = np.ones(len(measured.categories), dtype=bool)
        results |= _row(kind, "", measured, everything)
        for category, name in sorted(names.items()):
            chosen = measured.categories == category
            if chosen.any():
                results |= _row(kind, f"-{name}", measured, chosen)
    return results


def _row(kind: str, suffix: str, measured: MeasuredErrors, chosen: np.ndarray) -> dict[str, float]:
    def mean(values: np.ndarray) -> float:
        return float(values[chosen].mean()) if chosen.any() else float("nan")

    return {
        f"{kind}_px{suffix}": mean(measured.pixels),
        f"{kind}_pct{suffix}": mean(measured.percent),
        f"{kind}_objects{suffix}": float(chosen.sum()),
    }


def format_errors(results: dict[str, float], kinds: Iterable[str], names: Iterable[str]) -> str:
    """A table of what :func:`summarize_errors` gives, for the log."""
    rows = []
    for kind in kinds:
        for label, suffix in (("all", ""), *((name, f"-{name}") for name in names)):
            if f"{kind}_px{suffix}" in results:
                values = [results[f"{kind}_{key}{suffix}"] for key in ("px", "pct", "objects")]
                rows.append([kind, label, *values])
    return tabulate(
        rows,
        headers=["landmarks", "category", "error (px)", "error (% of size)", "objects"],
        tablefmt="pipe",
        floatfmt=("", "", ".2f", ".2f", ".0f"),
        numalign="left",
    )


def distance_to_outline(points: np.ndarray, polygons: Sequence[np.ndarray]) -> np.ndarray:
    """Distance of each point (M, 2) to the nearest point on the edges of closed polygons: (M,)."""
    starts, edges = _edges(polygons)
    squared = np.maximum((edges**2).sum(axis=1), np.finfo(float).tiny)
    dx = points[:, 0, None] - starts[:, 0]
    dy = points[:, 1, None] - starts[:, 1]
    share = ((dx * edges[:, 0] + dy * edges[:, 1]) / squared).clip(0, 1)
    dx -= share * edges[:, 0]
    dy -= share * edges[:, 1]
    return np.sqrt((dx * dx + dy * dy).min(axis=1))


def sample_outline(polygons: Sequence[np.ndarray], number: int) -> np.ndarray:
    """``number`` points (number, 2) at equal distances along the edges of closed polygons, part
    after part."""
    starts, edges = _edges(polygons)
    ends_at = np.cumsum(np.hypot(edges[:, 0], edges[:, 1]))
    at = (np.arange(number) + 0.5) * ends_at[-1] / number
    index = np.searchsorted(ends_at, at)
    lengths = np.diff(ends_at, prepend=0)
    share = 1 - (ends_at[index] - at) / lengths[index]
    return starts[index] + share[:, None] * edges[index]


def _edges(polygons: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Where the edges of closed polygons start (E, 2), and their vectors (E, 2)."""
    starts = np.concatenate(polygons).astype(np.float64)
    ends = np.concatenate([np.roll(polygon, -1, axis=0) for polygon in polygons])
    return starts, ends - starts


def _distances(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    return np.hypot(points[:, 0] - others[:, 0], points[:, 1] - others[:, 1])

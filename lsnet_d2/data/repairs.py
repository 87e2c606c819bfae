"""What is wrong with parts of a COCO annotation, and what can stand in for them without a loss.

Each function takes a copy of an annotation, changes that in place, and returns pairs of texts: what
is wrong, and what stands in its place now; empty where nothing does.
"""

import numpy as np

from .extreme_points import as_extreme_points
from .keypoints import check_triples, is_coordinate, is_finite
from .polygons import (
    bounding_box,
    check_form,
    check_rle,
    clip_polygons,
    is_usable,
    read_polygons,
    segmentation_to_polygons,
)

LEFT_OUT = "left out"
VISIBILITIES = (0, 1, 2)  # COCO's: not labelled, hidden, visible

Repairs = list[tuple[str, str]]


def repair_segmentation(annotation: dict, image: dict) -> Repairs:
    """A flat list becomes one polygon, polygons without an area inside the image are left out, and
    so is what is no segmentation at all.

    Args:
        image: with ``height`` and ``width``.
    """
    found: Repairs = []
    segmentation = annotation.get("segmentation")
    if _is_flat_polygon(segmentation):
        found.append(("a segmentation that is a flat list of numbers", "one polygon"))
        segmentation = annotation["segmentation"] = [segmentation]
    size = image["height"], image["width"]
    try:
        check_form(segmentation, size)
        if isinstance(segmentation, dict):
            check_rle(segmentation, *size)
            return found
        parts = read_polygons(segmentation or ())
    except (TypeError, ValueError) as error:
        del annotation["segmentation"]
        return [*found, (str(error), "no segmentation")]
    kept = []
    for index, (part, polygon) in enumerate(zip(segmentation or (), parts, strict=True)):
        text = _polygon_problem(polygon, image)
        if text:
            found.append((f"polygon number {index} {text}", LEFT_OUT))
        else:
            kept.append(part)
    if len(kept) < len(parts):
        annotation["segmentation"] = kept
    return found


def _is_flat_polygon(segmentation: object) -> bool:
    return (
        isinstance(segmentation, list)
        and len(segmentation) >= 6
        and len(segmentation) % 2 == 0
        and all(isinstance(number, (int, float)) for number in segmentation)
    )


def _polygon_problem(polygon: np.ndarray, image: dict) -> str:
    if not np.isfinite(polygon).all():
        return "has coordinates that are not finite"
    if not is_usable(polygon):
        return "encloses nothing"
    if not clip_polygons([polygon], image["width"], image["height"]):
        return "lies outside its image"
    return ""


def repair_box(annotation: dict, image: dict) -> str:
    """Put the box around the segmentation in place of that of the annotation.

    Args:
        image: with ``height`` and ``width``.

    Returns:
        What was done; empty where there is no usable segmentation.
    """
    height, width = image["height"], image["width"]
    parts = segmentation_to_polygons(annotation.get("segmentation"), height, width)
    parts = clip_polygons(parts, width, height)
    if not parts:
        return ""
    x0, y0, x1, y1 = bounding_box(parts).tolist()
    annotation["bbox"] = [x0, y0, x1 - x0, y1 - y0]
    return "the box around its segmentation"


def repair_keypoints(annotation: dict, count: int) -> Repairs:
    """Keypoints of another number are left out, those that are not finite become not labelled, and
    ``num_keypoints`` is counted. Unknown visibilities stay.

    Args:
        count: keypoints that the annotation's category has; 0 if they are not known.
    """
    keypoints = annotation.get("keypoints")
    if not keypoints:
        return []
    found: Repairs = []
    if not isinstance(keypoints, list):
        annotation["keypoints"] = []
        return [("its keypoints are no list", "no keypoints")]
    if len(keypoints) % 3 or count and len(keypoints) != 3 * count:
        wanted = f", not {3 * count}" if count else ", which are no triples"
        found.append((f"{len(keypoints)} numbers of keypoints{wanted}", "no keypoints"))
        keypoints = annotation["keypoints"] = []
    try:
        check_triples(keypoints)
    except ValueError as error:
        triples = [keypoints[start : start + 3] for start in range(0, len(keypoints), 3)]
        triples = [triple if all(map(is_coordinate, triple)) else [0, 0, 0] for triple in triples]
        keypoints = annotation["keypoints"] = [n for triple in triples for n in triple]
        found.append((str(error), "those that are not count as not labelled"))
    unknown = sorted({v for v in keypoints[2::3] if v not in VISIBILITIES})
    if unknown:
        shown = ", ".join(map(str, unknown))
        found.append((f"keypoints with the visibility {shown}; it must be 0, 1 or 2", ""))
    labelled = sum(v > 0 for v in keypoints[2::3])
    stated = annotation.get("num_keypoints", labelled)
    if stated != labelled:
        annotation["num_keypoints"] = labelled
        found.append((f"its num_keypoints is {stated!r}, but {labelled} are labelled", "counted"))
    return found


def repair_extreme_points(annotation: dict) -> Repairs:
    """Malformed ones are left out; they are derived from the segmentation then."""
    if "extreme_points" not in annotation:
        return []
    try:
        as_extreme_points(annotation["extreme_points"])
    except ValueError as error:
        del annotation["extreme_points"]
        return [(str(error), "no extreme_points")]
    return []


def repair_area(annotation: dict) -> Repairs:
    """An area that is no number is left out; the box's stands in for it."""
    if "area" not in annotation or is_finite(annotation["area"]):
        return []
    return [(f"its area is {annotation.pop('area')!r}", LEFT_OUT)]

"""Segmentations as polygons: reading COCO's three forms, and cutting polygons at a border.

A polygon is an array (n, 2) of x, y, closed without repeating its first vertex; the upper left
pixel of an image covers [0, 1] x [0, 1].
"""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as mask_util

# A polygon is a line when no vertex is farther from its longest extent than this share of it.
_FLAT = 1e-6


def segmentation_to_polygons(segmentation: Any, height: int, width: int) -> list[np.ndarray]:
    """The usable parts of an annotation's ``segmentation``.

    Args:
        segmentation: COCO's polygons (lists or arrays x, y, x, y, ...), compressed RLE,
            uncompressed RLE, or None.
        height, width: of the image that it belongs to.

    Returns:
        Polygons. Parts that enclose nothing are left out: see :func:`is_usable`. Of masks, the
        outer outlines, as :func:`mask_to_polygons` draws them.

    Raises:
        ValueError: an RLE is damaged or of another image size, or the form is unknown.
    """
    if segmentation is None:
        return []
    if isinstance(segmentation, dict):
        return mask_to_polygons(decode_rle(segmentation, height, width))
    if not isinstance(segmentation, (list, tuple)):
        raise ValueError(f"a segmentation of type {type(segmentation).__name__}")
    polygons = []
    for part in segmentation:
        if np.ndim(part) == 0:
            raise ValueError("a segmentation of numbers; it must be a list of polygons")
        values = np.array(part, dtype=np.float64).reshape(-1)
        if values.size >= 6 and values.size % 2 == 0 and is_usable(values.reshape(-1, 2)):
            polygons.append(values.reshape(-1, 2))
    return polygons


def decode_rle(rle: dict, height: int, width: int) -> np.ndarray:
    """An RLE, compressed or not, as a mask (height, width) uint8 of 0 and 1.

    Raises:
        ValueError: it is damaged, or of another size.
    """
    if list(rle.get("size", ())) != [height, width]:
        raise ValueError(
            f"an RLE of (height, width) {rle.get('size')} in an image of {[height, width]}"
        )
    counts = rle.get("counts")
    if isinstance(counts, list):
        if sum(counts) != height * width or min(counts, default=0) < 0:
            raise ValueError(f"the counts of an RLE sum up to {sum(counts)}, not {height * width}")
        rle = mask_util.frPyObjects(rle, height, width)
    elif not isinstance(counts, (str, bytes)):
        raise ValueError("an RLE without counts")
    else:
        runs = _run_lengths(counts)
        if runs.sum() != height * width or runs.min(initial=0) < 0:
            # pycocotools would leave the rest of the mask as it finds the memory
            raise ValueError(f"the runs of an RLE sum up to {runs.sum()}, not {height * width}")
    return mask_util.decode(rle)


def _run_lengths(counts: str | bytes) -> np.ndarray:
    """The numbers in a compressed RLE (pycocotools, ``rleFrString``).

    A character has six bits above 48: five of a number, lowest first, and one that says whether the
    number goes on. From the fourth on, numbers are differences to the last but one.

    Raises:
        ValueError: other characters, or the last number does not end.
    """
    text = counts.encode("ascii", "replace") if isinstance(counts, str) else counts
    bits = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    if ((bits < 0) | (bits > 63)).any() or (bits.size and bits[-1] & 32):
        raise ValueError("the counts of an RLE are damaged")
    ends = np.flatnonzero(bits & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])[: len(ends)]
    if len(ends) and (ends - starts).max() > 7:
        raise ValueError("the counts of an RLE are damaged")
    place = 5 * (np.arange(len(bits)) - np.repeat(starts, ends - starts + 1))
    values = np.add.reduceat((bits & 31) << place, starts) if len(ends) else bits
    negative = bits[ends] & 16 != 0
    values = values - (negative.astype(np.int64) << (5 * (ends - starts + 1)))
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return values


def polygons_to_rle(polygons: np.ndarray, height: int, width: int) -> list[dict]:
    """The masks of closed polygons of one image, without drawing them.

    Of polygons that cross themselves, as predicted contours may, COCO's rule says what is inside:
    even-odd.

    Args:
        polygons: (N, P, 2), P at least 3. What lies outside the image is cut off.
        height, width: of the image.

    Returns:
        N compressed RLEs, with ``counts`` as text, so that they can be written as JSON.

    Raises:
        ValueError: fewer than three vertices, or coordinates that are not finite.
    """
    polygons = np.asarray(polygons, dtype=np.float64)
    if not len(polygons):
        return []
    if polygons.shape[1] < 3:  # four numbers would be taken for a box
        raise ValueError(f"a polygon of {polygons.shape[1]} vertices")
    if not np.isfinite(polygons).all():
        raise ValueError("a polygon with coordinates that are not finite")
    rles = mask_util.frPyObjects(list(polygons.reshape(len(polygons), -1)), height, width)
    return [{**rle, "counts": rle["counts"].decode("ascii")} for rle in rles]


def is_usable(polygon: np.ndarray) -> bool:
    """Whether a polygon has three vertices, finite coordinates, and does not lie on one line."""
    if len(polygon) < 3 or not np.isfinite(polygon).all():
        return False
    spokes = polygon[1:] - polygon[0]
    squared = (spokes**2).sum(axis=1)
    longest = spokes[squared.argmax()]
    heights = spokes[:, 0] * longest[1] - spokes[:, 1] * longest[0]
    return bool(np.abs(heights).max() > _FLAT * squared.max())


def bounding_box(polygons: Sequence[np.ndarray]) -> np.ndarray:
    """XYXY (4,) around all vertices."""
    points = np.concatenate(polygons)
    return np.concatenate([points.min(axis=0), points.max(axis=0)])


def mask_to_polygons(mask: np.ndarray) -> list[np.ndarray]:
    """Outer outlines of a mask's connected regions.

    They run through the corners of pixels, not through their centres, so that their bounding box
    is that of the pixels' area. Gaps of one pixel are closed; pixels that touch at a corner are
    connected. The outlines have a vertex at every corner that they pass.

    Args:
        mask: (H, W), non-zero inside.
    """
    inside = (mask != 0).astype(np.uint8)
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    if not len(rows):
        return []
    top, left = rows[0], columns[0]
    inside = inside[top : rows[-1] + 1, left : columns[-1] + 1]
    corners = cv2.dilate(np.pad(inside, ((0, 1), (0, 1))), np.ones((2, 2), np.uint8))
    outlines, _ = cv2.findContours(corners, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return [
        outline.reshape(-1, 2) + np.array([left, top], dtype=np.float64) for outline in outlines
    ]


def clip_polygons(polygons: Sequence[np.ndarray], width: float, height: float) -> list[np.ndarray]:
    """The parts of polygons inside [0, width] x [0, height].

    A polygon of which the border cuts off the middle becomes several. Those inside stay as they
    are; parts that lie on one line are dropped.
    """
    clipped = []
    for polygon in polygons:
        x0, y0, x1, y1 = bounding_box([polygon])
        if x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height:
            clipped.append(polygon)
            continue
        pieces = [polygon]
        for axis, sign, border in ((0, 1, 0), (0, -1, width), (1, 1, 0), (1, -1, height)):
            pieces = [part for piece in pieces for part in _cut(piece, axis, sign, border)]
        clipped += [piece for piece in pieces if is_usable(piece)]
    return clipped


def _cut(polygon: np.ndarray, axis: int, sign: int, border: float) -> list[np.ndarray]:
    """The parts of a polygon where ``sign * (coordinate[axis] - border)`` is positive.

    The chains of vertices inside are joined along the line the way the polygon's inside lies:
    first crossing with the second, third with the fourth. So parts that only the lost piece
    connected come apart (in contrast to Sutherland and Hodgman's algorithm).
    """
    distance = sign * (polygon[:, axis] - border)
    if (distance >= 0).all():
        return [polygon]
    inside = distance > 0
    if not inside.any():
        return []
    enters = np.flatnonzero(inside & ~np.roll(inside, 1))  # first vertex of each chain
    polygon, distance = np.roll(polygon, -enters[0], axis=0), np.roll(distance, -enters[0])
    enters = enters - enters[0]
    leaves = np.flatnonzero((distance > 0) & ~(np.roll(distance, -1) > 0)) + 1  # one past the last

    def crossing(outside: int, first: int) -> np.ndarray:
        share = distance[outside] / (distance[outside] - distance[first])
        point = polygon[outside] + share * (polygon[first] - polygon[outside])
        point[axis] = border
        return point

    chains = []
    for first, end in zip(enters, leaves, strict=True):
        entry, exit_ = crossing(first - 1, first), crossing(end % len(polygon), end - 1)
        chains.append(np.concatenate([[entry], polygon[first:end], [exit_]]))
    if len(chains) == 1:
        return chains

    ends = np.array([[chain[0, 1 - axis], chain[-1, 1 - axis]] for chain in chains])
    order = ends.reshape(-1).argsort(kind="stable").reshape(-1, 2)  # 2k: entry, 2k + 1: exit of k
    if (order.sum(axis=1) % 2 == 0).any():  # an outline that crosses itself has no inside
        return [np.concatenate(chains)]
    follows = {}
    for pair in order.tolist():
        entry, exit_ = sorted(pair, key=lambda index: index % 2)
        follows[exit_ // 2] = entry // 2
    parts = []
    while follows:
        chain = next(iter(follows))
        loop = []
        while chain in follows:
            loop.append(chains[chain])
            chain = follows.pop(chain)
        parts.append(np.concatenate(loop))
    return parts

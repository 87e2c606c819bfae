"""Segmentations as polygons: reading COCO's three forms, and cutting polygons at a border.

A polygon is an array (n, 2) of x, y, closed without repeating its first vertex; the upper left
pixel of an image covers [0, 1] x [0, 1].
"""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from contourpy import FillType, contour_generator
from pycocotools import mask as mask_util

# A polygon is a line when no vertex is farther from its longest extent than this share of it.
_FLAT = 1e-6
# A hole below this share of the mask that it is in is taken for noise.
_LEAST_HOLE = 0.05


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
        ValueError: an RLE is damaged, or see :func:`check_form`.
    """
    return segmentation_to_outlines(segmentation, height, width)[0]


def segmentation_to_outlines(
    segmentation: Any, height: int, width: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The parts of :func:`segmentation_to_polygons`, and the holes in them, which a mask alone can
    have: see :func:`mask_holes`."""
    check_form(segmentation, (height, width))
    if segmentation is None:
        return [], []
    if isinstance(segmentation, dict):
        mask = decode_rle(segmentation, height, width)
        return mask_to_polygons(mask), mask_holes(mask)
    return [part for part in read_polygons(segmentation) if is_usable(part)], []


def read_polygons(segmentation: Sequence) -> list[np.ndarray]:
    """Polygons (N, 2) float64, as they are, of a list that :func:`check_form` has seen.

    Raises:
        ValueError: something in it is no number, or too large for one.
    """
    try:
        return [np.array(part, dtype=np.float64).reshape(-1, 2) for part in segmentation]
    except (OverflowError, TypeError) as error:
        raise ValueError(f"a segmentation that is no list of numbers: {error}") from error


def check_form(segmentation: Any, image_size: tuple[int, int] | None) -> None:
    """What can be found out about a segmentation without decoding it.

    Args:
        image_size: (height, width) of the image that it belongs to, if it is known.

    Raises:
        ValueError: it is none of COCO's three forms: a flat list in place of a list of polygons, a
            polygon with an odd number of coordinates, or something else altogether; or an RLE of
            another size than the image.
    """
    if segmentation is None:
        return
    if isinstance(segmentation, dict):
        size = segmentation.get("size")
        if image_size is not None and not np.array_equal(size, image_size):
            raise ValueError(f"an RLE of (height, width) {size} in an image of {list(image_size)}")
        return
    if not isinstance(segmentation, (list, tuple)):
        raise ValueError(f"a segmentation of type {type(segmentation).__name__}")
    for part in segmentation:
        if isinstance(part, (int, float)):
            raise ValueError(
                "a segmentation that is a flat list of numbers; it must be a list of polygons, "
                "[[x, y, x, y, ...], ...]"
            )
        if not isinstance(part, (list, tuple, np.ndarray)):
            raise ValueError(f"a segmentation with a part of type {type(part).__name__}")
        if len(part) % 2 and np.isscalar(part[0]):
            raise ValueError(f"a polygon of {len(part)} numbers, which are no pairs x, y")


def check_segmentation(segmentation: Any, image_size: tuple[int, int] | None) -> None:
    """As :func:`check_form`, and whether it can be read: numbers, and the runs of an RLE.

    Raises:
        ValueError: it cannot.
    """
    check_form(segmentation, image_size)
    if isinstance(segmentation, dict):
        if image_size is not None:
            check_rle(segmentation, *image_size)
    elif segmentation is not None and not all(
        np.isfinite(part).all() for part in read_polygons(segmentation)
    ):
        raise ValueError("a polygon with a coordinate that is no finite number")


def decode_rle(rle: dict, height: int, width: int) -> np.ndarray:
    """An RLE, compressed or not, as a mask (height, width) uint8 of 0 and 1.

    Raises:
        ValueError: see :func:`check_rle`.
    """
    check_rle(rle, height, width)
    if isinstance(rle["counts"], list):
        rle = mask_util.frPyObjects(rle, height, width)
    return mask_util.decode(rle)


def check_rle(rle: dict, height: int, width: int) -> None:
    """Check that the runs of an RLE, compressed or not, cover its image.

    pycocotools, which decodes it, minds only runs beyond the end: where they stop early, the rest
    of the mask is whatever is in memory.

    Raises:
        ValueError: they do not, or they are damaged, or the RLE is of another size.
    """
    check_form(rle, (height, width))
    counts = rle.get("counts")
    if isinstance(counts, (str, bytes)):
        counts = _run_lengths(counts.encode() if isinstance(counts, str) else counts)
    elif not isinstance(counts, list) or not all(isinstance(n, (int, np.integer)) for n in counts):
        raise ValueError("an RLE without counts, or they are neither text nor whole numbers")
    if min(counts, default=0) < 0:
        raise ValueError("a damaged RLE: a run of negative length")
    if sum(counts) != height * width:
        raise ValueError(f"the counts of an RLE sum up to {sum(counts)}, not {height * width}")


def _run_lengths(counts: bytes) -> list[int]:
    """The runs in the ``counts`` of a compressed RLE.

    A number has five bits a character, the lowest ones first, as 48 + bits; 32 is added to all
    characters but its last one, of which 16 is the sign. From the fourth number on it is the
    difference to the number before the previous one.

    Raises:
        ValueError: a character is no such code, the last number is not complete, or one has more
            than 35 bits.
    """
    codes = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes & 32 == 0)
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError("a damaged RLE: its counts are no whole code")
    starts = np.concatenate([[0], ends[:-1] + 1])
    places = np.arange(len(codes)) - np.repeat(starts, ends + 1 - starts)
    if places.max() > 6:
        raise ValueError("a damaged RLE: a run without end")
    runs = np.add.reduceat((codes & 31) << 5 * places, starts)
    runs -= (codes[ends] & 16) >> 4 << 5 * (places[ends] + 1)
    for first in (1, 2):
        runs[first::2] = runs[first::2].cumsum()
    return runs.tolist()


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


def bounds(points: np.ndarray) -> np.ndarray:
    """(2, 2): least and greatest x, y of points (n, 2)."""
    return np.stack([points.min(axis=0), points.max(axis=0)])


def bounding_box(polygons: Sequence[np.ndarray]) -> np.ndarray:
    """XYXY (4,) around all vertices."""
    return bounds(np.concatenate(polygons)).reshape(4)


def signed_area(polygon: np.ndarray) -> float:
    """Of a polygon (n, 2). Negative where it runs counter-clockwise on the screen (y down)."""
    x, y = (polygon - polygon[0]).T
    return float(x[:-1] @ y[1:] - x[1:] @ y[:-1]) / 2


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


def mask_holes(mask: np.ndarray) -> list[np.ndarray]:
    """Outlines of the holes in a mask, drawn as :func:`mask_to_polygons` draws regions.

    A hole is what no path from pixel to pixel, across their sides, connects with the border.
    Those below a twentieth of the mask's area are left out.

    Args:
        mask: (H, W), non-zero inside.
    """
    inside = (mask != 0).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(
        1 - np.pad(inside, 1), connectivity=4
    )
    least = _LEAST_HOLE * inside.sum()
    outside = labels[0, 0]
    return [
        outline
        for label in range(1, count)
        if label != outside and stats[label, cv2.CC_STAT_AREA] >= least
        for outline in mask_to_polygons(labels[1:-1, 1:-1] == label)
    ]


def level_set(values: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Outlines of where interpolated values are above 0, and of the holes in it.

    Args:
        values: (H, W), at x = 0 to W - 1 and y = 0 to H - 1. What is above 0 at an edge ends half a
            cell beyond.

    Returns:
        Polygons, and holes.
    """
    padded = np.pad(values, 1, mode="edge")
    for border in (padded[0], padded[-1], padded[:, 0], padded[:, -1]):
        border[:] = -np.abs(border)
    generator = contour_generator(z=padded, fill_type=FillType.OuterOffset)
    outlines, holes = [], []
    for points, offsets in zip(*generator.filled(0, np.inf), strict=True):
        outer, *inner = np.split(points - 1, offsets[1:-1])
        outlines.append(outer[:-1])  # the first point is repeated
        holes += [ring[:-1] for ring in inner]
    return outlines, holes


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

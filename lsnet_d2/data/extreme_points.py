"""Extreme points of an object: where its outline reaches highest, leftmost, lowest, rightmost.

The order is top, left, bottom, right everywhere in the package. Coordinates are (x, y) in pixels
of whichever image the polygons are in; nothing here depends on an image.
"""

from collections.abc import Sequence

import numpy as np

# Top, left, bottom, right: the coordinate that is extreme (0: x, 1: y), and if it is the least.
_SIDES = ((1, True), (0, True), (1, False), (0, False))


def extreme_points(
    polygons: Sequence[np.ndarray],
    *,
    joined: bool = True,
    integer: bool = False,
    tolerance: float = 0.02,
) -> np.ndarray:
    """Top, left, bottom and right extreme points of an object's polygons.

    The first vertex of the least y (and so on for each side) starts a run, which goes on along the
    outline both ways as long as vertices are within ``tolerance`` of the object's extent from the
    extreme. The point has the extreme coordinate, and in the other direction it lies in the middle
    of what the run covers. (ExtremeNet, arXiv 1901.08043, section 4.1; released LSNet code,
    ``gen_coco_lsvr.py``.)

    Args:
        polygons: parts of one object, each (n, 2) as x, y. Any list of points will do, also
            pixels in reading order, for which the released code has this rule.
        joined: as the released code does it, the parts are one sequence of vertices, in which
            neighbours run from one part to the next, and of which the end continues with just
            one vertex of the start. False: each part is a closed outline of its own, and the
            part that reaches farthest has the point. The result then does not depend on the
            vertex with which a part starts, unless the extreme is reached in several places.
        integer: round the coordinate along the side down to an integer, as the released code does.
        tolerance: share of (extent + 1 pixel) that still counts as the extreme.

    Returns:
        (4, 2) float64 as x, y: top, left, bottom, right.

    Raises:
        ValueError: there are no points, or some are not finite.
    """
    parts = [np.asarray(part, dtype=np.float64).reshape(-1, 2) for part in polygons]
    parts = [part for part in parts if len(part)]
    if not parts:
        raise ValueError("extreme points of no points")
    points = np.concatenate(parts) if len(parts) > 1 else parts[0]
    low, high = points.min(axis=0), points.max(axis=0)
    if not np.isfinite(low + high).all():
        raise ValueError("extreme points of coordinates that are not finite")
    limits = (tolerance * (high - low + 1)).tolist()
    if joined:
        parts = [np.concatenate([points[-1:], points, points[:1]])]
    columns = [part.T.tolist() for part in parts]  # runs are short: plain lists are fastest

    result = np.empty((4, 2))
    for row, (axis, is_least) in enumerate(_SIDES):
        pick, extreme = (min, low[axis]) if is_least else (max, high[axis])
        part = next(c for c in columns if pick(c[axis]) == extreme)
        run = _run(part[axis], part[axis].index(extreme), limits[axis], closed=not joined)
        along = [part[1 - axis][index] for index in run]
        middle = max(along) + min(along)
        result[row, axis] = extreme
        result[row, 1 - axis] = middle // 2 if integer else middle / 2
    return result


def _run(values: list[float], start: int, limit: float, *, closed: bool) -> list[int]:
    """Indices around ``start`` without a gap, of values at most ``limit`` away from the value
    there. ``closed``: the first value follows the last."""
    count = len(values)
    run = [start]
    for step in (1, -1):
        index = start + step
        while len(run) < count and (closed or 0 <= index < count):
            if abs(values[index % count] - values[start]) > limit:
                break
            run.append(index % count)
            index += step
    return run


def side_midpoints(boxes: np.ndarray) -> np.ndarray:
    """What stands in for the extreme points of an object of which only the box is known.

    Args:
        boxes: (..., 4) XYXY.

    Returns:
        (..., 4, 2): the middles of the top, left, bottom and right sides.
    """
    x0, y0, x1, y1 = np.moveaxis(np.asarray(boxes, dtype=np.float64), -1, 0)
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    corners = [(x, y0), (x0, y), (x, y1), (x1, y)]
    return np.stack([np.stack(corner, axis=-1) for corner in corners], axis=-2)


def as_extreme_points(value: Sequence) -> np.ndarray:
    """The extreme points that an annotation's key ``extreme_points`` holds.

    Args:
        value: flat or a list of points, in the order of this module; a fifth point, the centre in
            files of the released code, is left out.

    Returns:
        (4, 2) float64.

    Raises:
        ValueError: it is not four or five finite points.
    """
    try:
        points = np.array(value, dtype=np.float64)
    except (OverflowError, TypeError, ValueError):
        points = np.empty(0)
    if points.size not in (8, 10) or not np.isfinite(points).all():
        raise ValueError(f"extreme_points must be four or five points, not {value}")
    return points.reshape(-1, 2)[:4]

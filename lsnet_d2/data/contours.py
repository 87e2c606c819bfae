"""Contours: an object's outline as a fixed number of points, as the contour branch learns it.

Points run counter-clockwise as seen on the screen (top, left, bottom, right; y points down), and
the first one is nearest to the middle of the bounding box's upper side. A network
that regresses point i from the object's centre needs it in about the same place of similar objects.
Coordinates are (x, y) in pixels of whichever image the polygons are in; nothing here depends on an
image.
"""

import heapq
from collections.abc import Sequence

import numpy as np

from .joining import join_parts
from .polygons import bounds, signed_area

CONTOUR_METHODS = ("adaptive", "reference")
MIN_POINTS, MAX_POINTS = 8, 128

# The released code places this many points on an outline, and takes each tenth of them.
_DENSE = 360
# Outlines of more vertices than this, such as those of masks, are thinned many vertices at a time.
_MANY_VERTICES = 256
# A key vertex this close to the start takes its place, as a share of even spacing.
_NEAR_START = 0.25


def resample_contour(
    polygons: Sequence[np.ndarray],
    num_points: int = 36,
    *,
    method: str = "adaptive",
    holes: Sequence[np.ndarray] = (),
    box: Sequence[float] | None = None,
) -> np.ndarray:
    """The contour of an object.

    "adaptive" joins the parts into one outline by bridges that have no width, each between the two
    closest vertices; left out are only parts inside others, and specks that do not reach beyond the
    bounding box of the parts joined before. Key vertices, those that change the outline's area
    most, become points. The first point is the outline's nearest to the middle of the upper side,
    or a key vertex within a quarter of an even spacing of it. The others are spread evenly between
    them, with as many in each gap as keeps all points close to where even spacing puts them. So the
    points' bounding box is exactly that of the object. After the parts, the contour crosses from
    its first point to each hole and goes around that the other way, so that the even-odd rule
    leaves the hole open.

    "reference" is the released LSNet code's sampling (``loading.py``, ``lsnet_head.py``): evenly
    along the largest part, past most vertices. See :func:`reference_contours`.

    Args:
        polygons: parts of one object, each (n, 2), closed without repeating the first vertex, in
            any direction. Two points or one will do, and enclose nothing.
        num_points: P, 8 to 128.
        method: one of ``CONTOUR_METHODS``.
        holes: outlines of holes, each (n, 2); "reference" fills them.
        box: XYXY that "reference" takes when no part is large enough; by default, that of the
            polygons.

    Returns:
        (P, 2) float64. Where the outline encloses nothing, it has the direction of the input.

    Raises:
        ValueError: there are no points, some are not finite, or an option is out of range.
    """
    if method not in CONTOUR_METHODS:
        raise ValueError(f"method must be one of {', '.join(CONTOUR_METHODS)}, not {method!r}")
    if method == "reference":
        contours = reference_contours(polygons, num_points, box=box)
        return max(contours, key=lambda contour: abs(signed_area(contour)))
    parts = _checked(polygons, num_points)
    outline = _open_holes(_start_at_top(join_parts(parts)), holes)
    keys = _key_vertices(outline, num_points)
    return _place(*_settle_start(outline, keys, num_points), num_points)


def reference_contours(
    polygons: Sequence[np.ndarray], num_points: int = 36, *, box: Sequence[float] | None = None
) -> np.ndarray:
    """The released code's contours of all parts of an object.

    Parts with a side of their box below 1 pixel or an area of at most 5 are dropped; when none
    is left, the box stands in. An outline gets 360 points, of which each tenth is taken; here
    point i is number ``i * 360 // num_points``, which is the same for 36 points. The first is the
    one nearest to the middle of the upper side.

    Args:
        polygons, num_points, box: see :func:`resample_contour`.

    Returns:
        (parts, P, 2) float64.

    Raises:
        ValueError: as in :func:`resample_contour`, or the box is not four finite numbers.
    """
    parts = _checked(polygons, num_points)
    if box is None:
        box = bounds(np.concatenate(parts)).reshape(-1)
    x0, y0, x1, y1 = np.asarray(box, dtype=np.float64).reshape(4).tolist()
    if not np.isfinite([x0, y0, x1, y1]).all():
        raise ValueError(f"the box of a contour is not finite: {box}")
    parts = [p for p in parts if np.ptp(p, axis=0).min() >= 1 and abs(signed_area(p)) > 5]
    parts = parts or [np.array([[x0, y0], [x0, y1], [x1, y1], [x1, y0]])]

    contours = np.empty((len(parts), num_points, 2))
    for index, part in enumerate(parts):
        contour = spread_over_edges(part, _DENSE)[np.arange(num_points) * _DENSE // num_points]
        if signed_area(contour) > 0:
            contour = contour[::-1]
        first = ((contour - _top_middle(contour)) ** 2).sum(axis=1).argmin()
        contours[index] = np.roll(contour, -first, axis=0)
    return contours


def spread_over_edges(polygon: np.ndarray, count: int) -> np.ndarray:
    """Points spread over an outline by the released code's rule.

    Each edge has its rounded share of the points, at least its first vertex. What is then missing
    goes to the longest edge, and what is too much is taken from the longest ones. Of more than
    ``count`` vertices, those at which the longest edges begin remain.

    Args:
        polygon: (n, 2).

    Returns:
        (count, 2), from the polygon's first vertex on.
    """
    ends = np.roll(polygon, -1, axis=0)
    lengths = np.sqrt(((ends - polygon) ** 2).sum(axis=1))
    order = lengths.argsort(kind="stable")
    if len(polygon) > count:
        return polygon[np.sort(order[-count:])]
    shares = lengths * count / max(lengths.sum(), np.finfo(float).tiny)
    numbers = np.maximum(np.round(shares), 1).astype(int)
    excess = numbers.sum() - count
    if excess < 0:
        numbers[order[-1]] -= excess
    elif excess > 0:
        longest = order[::-1]
        spare = numbers[longest] - 1
        numbers[longest] -= np.clip(excess - (spare.cumsum() - spare), 0, spare)
    edge = np.repeat(np.arange(len(polygon)), numbers)
    place = (np.arange(count) - (numbers.cumsum() - numbers)[edge]) / numbers[edge]
    return polygon[edge] * (1 - place[:, None]) + ends[edge] * place[:, None]


def _checked(polygons: Sequence[np.ndarray], num_points: int) -> list[np.ndarray]:
    if not MIN_POINTS <= num_points <= MAX_POINTS:
        raise ValueError(f"a contour has {MIN_POINTS} to {MAX_POINTS} points, not {num_points}")
    parts = [np.asarray(part, dtype=np.float64).reshape(-1, 2) for part in polygons]
    parts = [part for part in parts if len(part)]
    if not parts:
        raise ValueError("a contour of no points")
    if not all(np.isfinite(part).all() for part in parts):
        raise ValueError("a contour of coordinates that are not finite")
    return parts


def _top_middle(points: np.ndarray) -> np.ndarray:
    low, high = bounds(points)
    return np.array([(low[0] + high[0]) / 2, low[1]])


def _start_at_top(outline: np.ndarray) -> np.ndarray:
    """The outline from its point nearest to the middle of the upper side on, which becomes a
    vertex where it is none.

    Of points equally near, it takes that where the outline runs to the left. So a bridge, which it
    passes both ways, leads to what is on the left first.
    """
    top = _top_middle(outline)
    edges = np.roll(outline, -1, axis=0) - outline
    squared = (edges**2).sum(axis=1)
    away = outline - top
    share = -(away * edges).sum(axis=1) / np.where(squared > 0, squared, 1)
    share = share.clip(0, 1)
    away += share[:, None] * edges
    distance = (away**2).sum(axis=1)
    nearest = np.flatnonzero(distance <= distance.min() * (1 + 1e-9) + squared.max() * 1e-18)
    edge = nearest[edges[nearest, 0].argmin()]
    if share[edge] == 0 or share[edge] == 1:
        return np.roll(outline, -edge - int(share[edge]), axis=0)
    return np.concatenate([[top + away[edge]], outline[edge + 1 :], outline[: edge + 1]])


def _open_holes(outline: np.ndarray, holes: Sequence[np.ndarray]) -> np.ndarray:
    """The outline, and after it each hole, clockwise, from its vertex nearest to the start on.

    The bridges go from the start to the holes: there a small change of the shape leaves them where
    they are, other than between the closest vertices of two outlines that run side by side.
    """
    start = outline[:1]
    pieces = [outline]
    for hole in holes:
        ring = np.asarray(hole, dtype=np.float64)
        ring = ring if signed_area(ring) > 0 else ring[::-1]
        ring = np.roll(ring, -((ring - start) ** 2).sum(axis=1).argmin(), axis=0)
        pieces += [start, ring, ring[:1]]
    return np.concatenate(pieces)


def _key_vertices(outline: np.ndarray, num_points: int) -> np.ndarray:
    """Indices, in order, of the first vertex, of one at least on each side of the bounding box,
    and of those that matter to the area.

    Vertices are removed one after the other, each time that with the smallest triangle between its
    neighbours (Visvalingam and Whyatt, 1993). It ends where no more than ``num_points`` are left
    and the smallest triangle is larger, as a share of the outline's area, than those at the corners
    of a regular polygon of half as many corners: a circle needs no key vertices to speak of.
    """
    least = _least_triangle(outline, num_points)
    sides = (outline[:, None] == bounds(outline)).reshape(-1, 4)
    kept = _thin(outline, sides.any(axis=1), least)
    sides = sides[kept]
    on_side = {i: np.flatnonzero(sides[i]).tolist() for i in np.flatnonzero(sides.any(axis=1))}
    left = sides.sum(axis=0).tolist()

    points = outline[kept]
    x, y = points.T.tolist()
    count = remaining = len(points)
    before, after = [count - 1, *range(count - 1)], [*range(1, count), 0]
    areas = _triangles(points).tolist()
    heap = list(zip(areas[1:], range(1, count), strict=True))
    heapq.heapify(heap)
    removed = np.zeros(count, dtype=bool)
    while heap:
        area, index = heapq.heappop(heap)
        if area != areas[index]:  # it changed in the meantime
            continue
        if area > least and remaining <= num_points:
            break
        if index in on_side:
            if any(left[side] == 1 for side in on_side[index]):
                continue
            for side in on_side[index]:
                left[side] -= 1
        removed[index], areas[index] = True, None
        remaining -= 1
        a, b = before[index], after[index]
        after[a], before[b] = b, a
        for i in (a, b):
            if i == 0:
                continue
            h, j = before[i], after[i]
            areas[i] = abs((x[i] - x[h]) * (y[j] - y[h]) - (y[i] - y[h]) * (x[j] - x[h])) / 2
            heapq.heappush(heap, (areas[i], i))
    return kept[~removed]


def _least_triangle(outline: np.ndarray, num_points: int) -> float:
    corners = num_points / 2
    share = 2 * (1 - np.cos(2 * np.pi / corners)) / corners
    return share * abs(signed_area(outline))


def _settle_start(
    outline: np.ndarray, keys: np.ndarray, num_points: int
) -> tuple[np.ndarray, np.ndarray]:
    """The outline from the key vertex on that is beside its start, and the keys without the start;
    or both as they are.

    At the top of a round object, the highest vertex is next to the point nearest to the middle.
    Were both among the contour's points, all others would have to make way, to the left or to the
    right as the vertex happens to be. The start stays where it matters as much as a key vertex
    does, or the bounding box needs it.
    """
    if len(keys) < 4:
        return outline, keys
    edges = np.roll(outline, -1, axis=0) - outline
    arc = np.concatenate([[0], np.hypot(edges[:, 0], edges[:, 1]).cumsum()])
    after, before = arc[keys[1]], arc[-1] - arc[keys[-1]]
    if min(after, before) > _NEAR_START * arc[-1] / num_points:
        return outline, keys
    corner = _triangles(outline[[keys[-1], 0, keys[1]]])[1]
    others = keys[1:]
    if corner > _least_triangle(outline, num_points) or not np.array_equal(
        bounds(outline[others]), bounds(outline)
    ):
        return outline, keys
    start = keys[1] if after <= before else keys[-1]
    return np.roll(outline, -start, axis=0), np.sort((others - start) % len(outline))


def _thin(outline: np.ndarray, on_side: np.ndarray, least: float) -> np.ndarray:
    """Indices of the vertices that remain when those with a triangle below ``least``, and smaller
    than both neighbours', go all at once, again and again until the vertices are few."""
    kept = np.arange(len(outline))
    while len(kept) > _MANY_VERTICES:
        # masks have runs of equal triangles: of these, each second one goes
        areas = _triangles(outline[kept]) + least * 1e-9 * (np.arange(len(kept)) % 2)
        goes = (areas < least) & (areas < np.roll(areas, 1)) & (areas < np.roll(areas, -1))
        goes &= ~on_side[kept]
        goes[0] = False
        if not goes.any():
            break
        kept = kept[~goes]
    return kept


def _triangles(outline: np.ndarray) -> np.ndarray:
    """Areas of the triangles of each vertex and its two neighbours."""
    before = np.roll(outline, 1, axis=0)
    u, v = outline - before, np.roll(outline, -1, axis=0) - before
    return np.abs(u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0]) / 2


def _place(outline: np.ndarray, keys: np.ndarray, num_points: int) -> np.ndarray:
    """The contour whose points are the key vertices and others spread between them.

    Even spacing would give a key vertex the index ``ideal``, which is no integer. The indices
    are integers that increase and have the least largest distance from it.
    """
    closed = np.concatenate([outline, outline[:1]])
    steps = np.sqrt((np.diff(closed, axis=0) ** 2).sum(axis=1))
    arc = np.concatenate([[0], steps.cumsum()])
    if arc[-1] == 0:
        return np.repeat(outline[:1], num_points, axis=0)
    keys = np.append(keys, len(outline))
    order = np.arange(len(keys))
    ideal = arc[keys] * (num_points / arc[-1])
    # without the order they must not decrease: half-way between the bounds from either side
    slack = ideal - order
    slack = np.maximum.accumulate(slack) + np.minimum.accumulate(slack[::-1])[::-1]
    index = order + np.rint((slack / 2).clip(0, num_points - order[-1])).astype(int)
    along = np.interp(np.arange(num_points), index, arc[keys])
    contour = np.stack([np.interp(along, arc, closed[:, axis]) for axis in (0, 1)], axis=1)
    contour[index[:-1]] = outline[keys[:-1]]
    return contour

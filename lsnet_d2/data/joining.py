"""One outline of an object in several parts: bridges without width between the parts."""

from collections.abc import Sequence

import numpy as np

from .polygons import bounds, signed_area

# Parts below this share of the object's area are specks.
_SPECK = 0.01


def join_parts(parts: Sequence[np.ndarray]) -> np.ndarray:
    """One outline of all parts, counter-clockwise; no vertex is equal to the one before.

    The parts are joined from large to small, each by a bridge between the two closest vertices.
    Left out are parts inside others, and specks that do not reach beyond the bounding box of the
    parts joined before.

    Args:
        parts: at least one, each (n, 2).

    Returns:
        (m, 2).
    """
    rings = []
    for part in parts:
        new = (part != np.roll(part, 1, axis=0)).any(axis=1)
        ring = part[new] if new.any() else part[:1]
        area = signed_area(ring)
        rings.append((abs(area), ring[::-1] if area > 0 else ring))
    rings.sort(key=lambda ring: -ring[0])
    total = sum(area for area, _ in rings)
    joined = rings[0][1]
    low, high = bounds(joined)
    for area, ring in rings[1:]:
        least, greatest = bounds(ring)
        within = (least >= low).all() and (greatest <= high).all()
        if within and (area < _SPECK * total or _is_inside(ring, joined)):
            continue
        low, high = np.minimum(low, least), np.maximum(high, greatest)
        here, there = closest_vertices(joined, ring)
        round_trip = np.concatenate([ring[there:], ring[: there + 1]])
        joined = np.concatenate([joined[: here + 1], round_trip, joined[here:]])
    return joined


def closest_vertices(first: np.ndarray, second: np.ndarray) -> tuple[int, int]:
    """Indices of the two closest vertices of two outlines; of several such pairs, the first.

    Long outlines are compared in runs of vertices. Pairs of runs whose boxes are farther apart
    than some two vertices cannot have the closest.

    Args:
        first, second: (n, 2), (m, 2).
    """
    run = 1 if len(first) * len(second) <= 4096 else 32
    members, low, high = [], [], []
    for outline in (first, second):
        starts = np.arange(0, len(outline), run)
        members.append(np.minimum(starts[:, None] + np.arange(run), len(outline) - 1))
        low.append(np.minimum.reduceat(outline, starts))
        high.append(np.maximum.reduceat(outline, starts))
    gaps = np.maximum(low[0][:, None] - high[1], low[1] - high[0][:, None]).clip(0)
    gaps = gaps[..., 0] ** 2 + gaps[..., 1] ** 2

    def squared(runs: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        a, b = first[members[0][runs[0]]], second[members[1][runs[1]]]
        x, y = (a[..., :, None, axis] - b[..., None, :, axis] for axis in (0, 1))
        return x**2 + y**2

    limit = squared(np.unravel_index(gaps.argmin(), gaps.shape)).min()
    runs = np.nonzero(gaps <= limit)
    distances = squared(runs)
    pair, i, j = np.nonzero(distances == distances.min())
    here, there = members[0][runs[0][pair], i], members[1][runs[1][pair], j]
    best = np.lexsort((there, here))[0]
    return int(here[best]), int(there[best])


def _is_inside(ring: np.ndarray, outline: np.ndarray) -> bool:
    """Whether an outline encloses most vertices of a ring: a ray to the right from those crosses
    it an odd number of times. Of long rings, up to 64 vertices are asked."""
    x, y = ring[:: len(ring) // 64 + 1].T[:, :, None]
    ends = np.roll(outline, -1, axis=0)
    meets = np.maximum(outline[:, 1], ends[:, 1]) >= y.min()
    meets &= np.minimum(outline[:, 1], ends[:, 1]) <= y.max()
    meets &= np.maximum(outline[:, 0], ends[:, 0]) >= x.min()
    (x0, y0), (x1, y1) = outline[meets].T, ends[meets].T
    spans = (y0 > y) != (y1 > y)
    crossing = x0 + (y - y0) * (x1 - x0) / np.where(y0 == y1, 1, y1 - y0)
    odd = (spans & (x < crossing)).sum(axis=1) % 2 == 1
    return bool(odd.mean() > 0.5)

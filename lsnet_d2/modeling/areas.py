"""The areas that closed polygons enclose, by the even-odd rule, seen on lattices of places.

Vertices that are a pixel off each do little harm in a round object and much in a limb, and some
errors of theirs cancel. What counts in the end is the area, so its IOU is what a contour is judged
by here, and, where a soft edge makes it differentiable, what it can learn from. (BoundaryFormer,
CVPR 2022, learns polygons from masks alone, by rendering them with a soft edge.)

Letters: N polygons, P vertices, K rows and columns of a lattice.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .points import square_lattice

_COUNT_OF_IOU = 48
_COUNT_OF_LOSS = 20
# What a lattice covers around the true object, relative to its box; predictions may be larger.
_EXTENT_OF_LOSS = 1.25
# How far from an edge coverage is 1 / (1 + 1 / e) or 1 / (1 + e), in cells: what is thinner than a
# cell is hardly covered.
_SOFTNESS = 0.5
_TINY = 1e-6
# Pairs of a place and an edge that are looked at together: more take more memory, and on a CPU do
# not stay in its cache.
_AT_ONCE, _AT_ONCE_ON_CPU = 2**20, 2**16


@dataclass
class Lattice:
    """For each polygon K * K places, row by row.

    Attributes:
        first: (N, 2), the first place as x, y in pixels.
        cell: (N, 2), from one to the next.
        count: K.
    """

    first: Tensor
    cell: Tensor
    count: int

    @staticmethod
    def over(points: Tensor, count: int, extent: float = 1.0) -> "Lattice":
        """Over the upright boxes of points (N, P, 2), which are enlarged by a factor."""
        low, high = points.amin(dim=1), points.amax(dim=1)
        cell = (high - low).clamp(min=1) * (extent / count)
        return Lattice((low + high) / 2 - cell * ((count - 1) / 2), cell, count)

    def __getitem__(self, index: Tensor) -> "Lattice":
        """Those of some of the polygons."""
        return Lattice(self.first[index], self.cell[index], self.count)

    @property
    def places(self) -> Tensor:
        """(N, K * K, 2) as x, y in pixels."""
        ticks = torch.arange(self.count, dtype=self.cell.dtype, device=self.cell.device)
        return self.first[:, None] + square_lattice(ticks) * self.cell[:, None]

    @property
    def boxes(self) -> Tensor:
        """(N, 4) XYXY: what the cells around the places cover."""
        low = self.first - self.cell / 2
        return torch.cat([low, low + self.cell * self.count], dim=1)

    def covered(self, polygons: Tensor) -> Tensor:
        """(N, K * K) bool: places that polygons (N, P, 2) enclose."""
        in_cells = (polygons.detach() - self.first[:, None]) / self.cell[:, None]
        return cells_inside(in_cells, (self.count, self.count)).flatten(1)

    def depth(self, polygons: Tensor) -> Tensor:
        """(N, K * K): how far inside the polygons the places are, outside below 0, in cells;
        differentiable."""
        distance = distance_to_outline(polygons, self.places)
        depth = torch.where(self.covered(polygons), distance, -distance)
        return depth / self.cell.prod(dim=1).sqrt()[:, None]

    def coverage(self, polygons: Tensor) -> Tensor:
        """(N, K * K) from 0 to 1: :meth:`covered` with a soft edge, differentiable."""
        return (self.depth(polygons) / _SOFTNESS).sigmoid()


def area_iou(polygons: Tensor, others: Tensor) -> Tensor:
    """(N,): the IOU of the areas of polygons (N, P, 2) and others, each with its own.

    Seen on a lattice of 48 x 48 places over both, so it is off by a hundredth or two for most
    shapes, by three where sides lie along the lattice's; parts thinner than a cell of it may be
    missed. 0 where neither encloses a place.
    """
    lattice = Lattice.over(torch.cat([polygons, others], dim=1), _COUNT_OF_IOU)
    a, b = lattice.covered(polygons), lattice.covered(others)
    return (a & b).sum(dim=1) / (a | b).sum(dim=1).clamp(min=1)


class SoftArea:
    """The areas of true polygons (N, P, 2) with soft edges, for others to be compared with."""

    @torch.no_grad()
    def __init__(self, true: Tensor) -> None:
        self._lattice = Lattice.over(true, _COUNT_OF_LOSS, _EXTENT_OF_LOSS)
        self._coverage = self._lattice.coverage(true)

    def loss(self, polygons: Tensor) -> Tensor:
        """(N,): 1 minus the IOU of polygons (N, P, 2), with soft edges too, and the true ones.

        Only places within 1.25 times the true box count, and only edges near one of them get a
        gradient: what lies far outside must be brought back by another loss. A bridge between
        parts is a soft slot, so moving it costs a little. Finite for finite polygons, even without
        area.
        """
        coverage, true = self._lattice.coverage(polygons), self._coverage
        shared, either = torch.minimum(coverage, true), torch.maximum(coverage, true)
        return 1 - shared.sum(dim=1) / either.sum(dim=1)


def distance_to_outline(polygons: Tensor, places: Tensor) -> Tensor:
    """(N, M): from places (N, M, 2) to the nearest edge of polygons (N, P, 2), differentiable in
    these."""
    parts = [(polygons.detach(), places)]
    if not torch.compiler.is_exporting():  # a loop over a number of parts that is not known
        pairs = _AT_ONCE_ON_CPU if places.is_cpu else _AT_ONCE
        at_once = max(pairs // (places.shape[1] * polygons.shape[1]), 1)
        parts = zip(*(x.split(at_once) for x in parts[0]), strict=True)
    edge = torch.cat([_nearest_edge(*part) for part in parts])[..., None].expand(-1, -1, 2)
    start, end = polygons.gather(1, edge), following(polygons).gather(1, edge)
    return (to_segment(places, start, end - start).square().sum(dim=2) + _TINY).sqrt()


def signed_areas(polygons: Tensor) -> Tensor:
    """(N,): of polygons (N, P, 2), in square pixels; negative if they run counter-clockwise as seen
    on the screen."""
    (x, y), (x_next, y_next) = polygons.unbind(-1), following(polygons).unbind(-1)
    return (x * y_next - y * x_next).sum(-1) / 2


def following(vertices: Tensor) -> Tensor:
    """(N, P, ...): of each vertex the next one. (torch.export cannot roll an unknown number.)"""
    return torch.cat([vertices[:, 1:], vertices[:, :1]], dim=1)


def to_segment(points: Tensor, start: Tensor, along: Tensor) -> Tensor:
    """Displacements (..., 2) from points to the nearest places of segments."""
    away = start - points
    length = along.square().sum(-1, keepdim=True)
    share = -(away * along).sum(-1, keepdim=True) / length.clamp(min=1e-12)
    return away + share.clamp(0, 1) * along


def _nearest_edge(polygons: Tensor, places: Tensor) -> Tensor:
    """(N, M): the edge that is nearest to a place.

    Edges are compared by the square of the distance less that of the place from the origin, which
    all have in common. So few large tensors are made, which is what takes the time on CPUs; and no
    matrix products, which autocast would compute in low precision.
    """
    origin = places[:, :1]  # squares lose less to rounding; no vertex: it may be NaN
    polygons, places = polygons - origin, places - origin
    along = following(polygons) - polygons
    length = along.square().sum(-1).clamp(min=_TINY)[:, None]
    onward = _dots(places, along, -(polygons * along).sum(-1))
    share = (onward / length).clamp_(0, 1)
    beyond = (share * length).sub_(onward, alpha=2).mul_(share)
    return beyond.add_(_dots(places, -2 * polygons, polygons.square().sum(-1))).argmin(2)


def _dots(places: Tensor, vectors: Tensor, summand: Tensor) -> Tensor:
    """(N, M, P): scalar products of (N, M, 2) and (N, P, 2), and a summand (N, P)."""
    (x, y), (dx, dy) = places[:, :, None].unbind(-1), vectors[:, None].unbind(-1)
    return torch.addcmul(summand[:, None], x, dx).addcmul_(y, dy)


def cells_inside(contours: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, H, W) bool: cells that a contour (P, 2) goes around an odd number of times.

    Along each row of cells the crossings of the outline are counted. Memory is linear in N * H *
    (W + P). Edges that are not finite cross nothing.

    Args:
        contours: (N, P, 2) as x, y in cells; cell (i, j) lies at x = j, y = i.
        size: (H, W).
    """
    height, width = size
    x, y = contours.unbind(-1)
    x_next, y_next = following(x), following(y)
    rows = torch.arange(height, dtype=x.dtype, device=x.device)
    crossed = (y[..., None] <= rows) != (y_next[..., None] <= rows)  # N, P, H
    rise = (y_next - y)[..., None]
    share = (rows - y[..., None]) / torch.where(crossed, rise, torch.ones_like(rise))
    crossing = x[..., None] + share * (x_next - x)[..., None]
    # The first cell from the crossing on, or one beyond the row.
    column = crossing.ceil().nan_to_num(nan=width).clamp(0, width).long()
    column = column.masked_fill(~crossed, width)
    count = x.new_zeros(x.shape[0], height, width + 1, dtype=torch.int32)
    count.scatter_add_(2, column.transpose(1, 2), crossed.transpose(1, 2).int())
    return count[..., :width].cumsum(2, dtype=torch.int32) % 2 == 1

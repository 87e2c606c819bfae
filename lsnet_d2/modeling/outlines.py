"""Maps of what covers a cell, and of where the nearest outline is.

Where there are outlines, every cell has something to tell: the classes of the objects that cover
it, and where the nearest outline is. At test time these maps are not computed, only the features
that they are made from.

Letters as in :mod:`.maps`, and K classes, P vertices.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .assigners import lowest_cost
from .blocks import same_conv, set_prior
from .landmarks import LandmarkTargets
from .maps import LandmarkMaps, mean_of

# How far from an outline a cell tells where it is, in cells, and the cells around an outline's
# points that may be as near.
_REACH = 1.5
_WINDOW = 2
_COVERED_BEFORE_TRAINING = 0.05


class OutlineMaps(LandmarkMaps):
    key = "OUTLINE_MAPS"
    loss_names = ("loss_covering", "loss_outline")

    def __init__(
        self, *, channels: int, num_classes: int, stride: int, loss_weights: Sequence[float]
    ) -> None:
        """
        Args:
            channels: C.
            num_classes: K.
            stride, loss_weights: see :class:`LandmarkMaps`; of what covers a cell, and of where the
                nearest outline is.
        """
        super().__init__(stride, loss_weights)
        self.covering = same_conv(channels, num_classes, 1)
        self.displacement = same_conv(channels, 2, 1)
        set_prior(self.covering, _COVERED_BEFORE_TRAINING)

    def errors(
        self,
        feature: Tensor,
        targets: list[LandmarkTargets],
        classes: list[Tensor],
        known: Tensor,
    ) -> tuple[Tensor, ...]:
        covering = self.covering(feature).float()
        displacement = self.displacement(feature).float().permute(0, 2, 3, 1)
        num_classes, *size = covering.shape[1:]
        contours = [t.landmarks for t in targets]
        covered = torch.stack(
            [
                classes_of_cells(outlines, labels, num_classes, size, self.stride)
                for outlines, labels in zip(contours, classes, strict=True)
            ]
        )
        nearest, near = zip(
            *(nearest_outline(outlines, size, self.stride) for outlines in contours), strict=True
        )
        loss = F.binary_cross_entropy_with_logits(covering, covered, reduction="none").mean(1)
        away = (displacement - torch.stack(nearest) / self.stride).abs().sum(3)
        return mean_of(loss, known), mean_of(away, torch.stack(near) & known)


def classes_of_cells(
    contours: Tensor, classes: Tensor, num_classes: int, size: tuple[int, int], stride: int
) -> Tensor:
    """(K, H, W), 1 where an object of the class covers the cell, else 0.

    Args:
        contours: (G, P, 2) in pixels.
        classes: (G,).
        size: (H, W).
    """
    covered = contours.new_zeros(num_classes, *size)
    inside = cells_inside(contours, size, stride).to(covered)
    index = classes[:, None, None].expand_as(inside)
    return covered.scatter_reduce(0, index, inside, "amax")


def cells_inside(contours: Tensor, size: tuple[int, int], stride: int) -> Tensor:
    """(G, H, W) bool: cells that a contour (P, 2) goes around an odd number of times.

    Along each row of cells the crossings of the outline are counted. Memory is linear in G * H *
    (W + P).
    """
    height, width = size
    x, y = (contours / stride).unbind(-1)
    x_next, y_next = x.roll(-1, 1), y.roll(-1, 1)
    rows = torch.arange(height, dtype=x.dtype, device=x.device)
    crossed = (y[..., None] <= rows) != (y_next[..., None] <= rows)  # G, P, H
    rise = (y_next - y)[..., None]
    share = (rows - y[..., None]) / torch.where(crossed, rise, torch.ones_like(rise))
    crossing = x[..., None] + share * (x_next - x)[..., None]
    # The first cell from the crossing on, or one beyond the row.
    column = crossing.ceil().clamp(0, width).long().masked_fill(~crossed, width)
    count = torch.zeros(len(contours), height, width + 1, dtype=torch.int32, device=x.device)
    count.scatter_add_(2, column.transpose(1, 2), crossed.transpose(1, 2).int())
    return count[..., :width].cumsum(2) % 2 == 1


def nearest_outline(contours: Tensor, size: tuple[int, int], stride: int) -> tuple[Tensor, Tensor]:
    """Where the nearest outline is from each cell that has one nearby.

    Args:
        contours: (G, P, 2) in pixels.
        size: (H, W).

    Returns:
        (H, W, 2), the displacement as x, y in pixels, 0 where none is near; (H, W) bool, cells that
        are near.
    """
    height, width = size
    start = (contours / stride).flatten(0, 1)
    along = (contours.roll(-1, 1) / stride).flatten(0, 1) - start
    # Points on the outlines no further apart than a cell, and the cells around them.
    pieces = along.norm(dim=1).ceil().clamp(min=1).long()
    segment = torch.repeat_interleave(pieces)
    first = pieces.cumsum(0) - pieces
    share = (torch.arange(len(segment), device=start.device) - first[segment]) / pieces[segment]
    points = start[segment] + share[:, None] * along[segment]
    window = torch.arange(-_WINDOW, _WINDOW + 1, device=start.device)
    window = torch.stack(torch.meshgrid(window, window, indexing="xy"), -1).view(-1, 2)
    cells = points.round().long()[:, None] + window  # (M, 25, 2)
    segment = segment[:, None].expand(cells.shape[:2])
    on_map = ((cells >= 0) & (cells < cells.new_tensor([width, height]))).all(2)
    cells, segment = cells[on_map], segment[on_map]
    distance = _to_segment(cells, start[segment], along[segment]).norm(dim=1)
    close = distance < _REACH
    cells, segment = cells[close], segment[close]
    owner = lowest_cost(height * width, cells[:, 1] * width + cells[:, 0], segment, distance[close])
    near = torch.nonzero(owner >= 0).squeeze(1)
    segment = owner[near]
    cells = torch.stack([near % width, near // width], dim=1)
    displacement = start.new_zeros(height * width, 2)
    displacement[near] = stride * _to_segment(cells, start[segment], along[segment])
    return displacement.view(height, width, 2), (owner >= 0).view(height, width)


def _to_segment(points: Tensor, start: Tensor, along: Tensor) -> Tensor:
    """Displacements (N, 2) from points to the nearest places of segments."""
    away = start - points
    length = along.square().sum(1, keepdim=True)
    share = -(away * along).sum(1, keepdim=True) / length.clamp(min=1e-12)
    return away + share.clamp(0, 1) * along

"""Features at single places of images."""

import torch
from torch import Tensor

from .bilinear import bilinear_corners
from .levels import flatten_levels, kept_by_size
from .row_sum import RowIndex, weighted_row_sum


class PointSampler:
    """Reads feature maps of several strides at single places, interpolated; zero outside.

    Args:
        features: per stride (B, C, H, W), C being the same; cell (i, j) lies at x = j * stride,
            y = i * stride.
        strides: of the maps.
    """

    def __init__(self, features: list[Tensor], strides: list[int]) -> None:
        sizes = [tuple(feature.shape[-2:]) for feature in features]
        self._table = flatten_levels(features).flatten(0, 1)
        self._cells_per_image = sum(height * width for height, width in sizes)
        self._levels = _levels(tuple(sizes), tuple(strides), self._table.device)

    def __call__(self, image: Tensor, points: Tensor) -> Tensor:
        """
        Args:
            image: (N,), in which image the points are.
            points: (N, V, 2) as x, y in pixels of the network's input.

        Returns:
            (N, V, L * C), what the L maps have one after the other.
        """
        stride, height, width, first_cell = self._levels
        # Places in half precision would be off by pixels.
        points = points.to(torch.promote_types(points.dtype, torch.float32))
        x, y = (points[:, :, None] / stride[:, None]).unbind(-1)
        cell, weight = bilinear_corners(y, x, height, width)
        image = image.to(cell.dtype)[:, None, None, None]
        rows = image * self._cells_per_image + first_cell[:, None] + cell
        sampled = weighted_row_sum(
            self._table,
            RowIndex(rows.view(-1, 4), self._table.shape[0]),
            weight.reshape(-1, 4).to(self._table.dtype),
        )
        return sampled.view(*points.shape[:2], len(stride) * self._table.shape[1])


@kept_by_size
def _levels(
    sizes: tuple[tuple[int, int], ...], strides: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stride, height, width and place in the list of all cells of an image, of each map (L,)."""
    height, width = torch.tensor(sizes).unbind(1)
    cells = height * width
    first_cell = cells.cumsum(0) - cells
    return (
        torch.tensor(strides, device=device),
        *(x.to(device, torch.int32) for x in (height, width, first_cell)),
    )

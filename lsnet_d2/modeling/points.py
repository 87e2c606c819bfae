"""Anchor points: the cells of all pyramid levels, in image coordinates."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layers.levels import expand_levels


@dataclass
class AnchorPoints:
    """Anchor points of all levels, level by level and row-major.

    Cell (i, j) of a level with stride s lies at x = j * s, y = i * s: no shift by half a cell.

    Attributes:
        xy: (A, 2) float32, in pixels of the network's input.
        strides: (A,) float32.
        sizes: (H, W) of each level.
    """

    xy: Tensor
    strides: Tensor
    sizes: list[tuple[int, int]]

    @property
    def per_level(self) -> list[int]:
        """Number of points of each level."""
        return [height * width for height, width in self.sizes]

    @property
    def levels(self) -> Tensor:
        """(A,) index of each point's level."""
        numbers = torch.arange(len(self.sizes), device=self.xy.device)
        return expand_levels(numbers, self.sizes)


def make_anchor_points(
    sizes: list[tuple[int, int]], strides: list[int], device: torch.device
) -> AnchorPoints:
    """
    Args:
        sizes: (H, W) of each level.
        strides: stride of each level.
    """
    xy = []
    for (height, width), stride in zip(sizes, strides, strict=True):
        y = torch.arange(height, dtype=torch.float32, device=device) * stride
        x = torch.arange(width, dtype=torch.float32, device=device) * stride
        xy.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).view(-1, 2))
    stride = torch.tensor(strides, dtype=torch.float32, device=device)
    return AnchorPoints(torch.cat(xy), expand_levels(stride, sizes), sizes)


def points_in_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """(A,) bool: points (A, 2) that lie in any of the boxes (M, 4) XYXY."""
    points = points[:, None]
    return ((points >= boxes[:, :2]) & (points < boxes[:, 2:])).all(dim=2).any(dim=1)


def square_lattice(ticks: Tensor) -> Tensor:
    """(K * K, 2) as x, y, row by row: the points with ticks (K,) for either coordinate."""
    return torch.cartesian_prod(ticks, ticks).view(-1, 2).flip(1)

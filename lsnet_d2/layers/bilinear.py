"""Bilinear interpolation as rows and weights of a table."""

import torch
from torch import Tensor


def bilinear_corners(
    y: Tensor, x: Tensor, height: Tensor | int, width: Tensor | int
) -> tuple[Tensor, Tensor]:
    """The four pixels around each location and their weights; pixels outside count as zero.

    Args:
        y, x: locations in pixels, pixel (i, j) having its value at y = i, x = j. Any shape (...).
        height, width: size of the map; broadcastable to ``y``.

    Returns:
        pixel (..., 4) int32, ``i * width + j``, always a valid pixel, in the order top left, top
        right, bottom left, bottom right; weight (..., 4), differentiable in ``y`` and ``x``, zero
        for pixels outside.
    """
    row, row_weight = neighbours(y, height)
    column, column_weight = neighbours(x, width)
    if isinstance(width, Tensor):
        width = width[..., None].to(row.dtype)
    pixel = (row * width)[..., :, None] + column[..., None, :]
    weight = row_weight[..., :, None] * column_weight[..., None, :]
    return pixel.flatten(-2), weight.flatten(-2)


def neighbours(position: Tensor, size: Tensor | int) -> tuple[Tensor, Tensor]:
    """The two pixels around each position on one axis, and their weights; 0 for those outside.

    Args:
        position: in pixels, any shape (...).
        size: number of pixels; broadcastable to ``position``.

    Returns:
        index (..., 2) int32, clamped to [0, size); weight (..., 2), differentiable in ``position``.
    """
    # Locations more than a pixel outside have no weight wherever they are: keep them near, so that
    # the conversion to an integer is defined.
    if isinstance(size, Tensor):
        position = torch.minimum(position.clamp(min=-2), (size + 1).to(position.dtype))
        size = size[..., None]
    else:
        position = position.clamp(min=-2, max=size + 1)
    lower = position.detach().floor()
    fraction = position - lower
    index = torch.stack([lower, lower + 1], dim=-1).to(torch.int32)
    inside = (index >= 0) & (index < size)
    weight = torch.stack([1 - fraction, fraction], dim=-1) * inside
    if isinstance(size, Tensor):
        index = torch.minimum(index.clamp(min=0), (size - 1).to(index.dtype))
    else:
        index = index.clamp(min=0, max=size - 1)
    return index, weight

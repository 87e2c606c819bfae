"""Features at single places of images."""

import torch
from torch import Tensor

from .bilinear import bilinear_corners
from .row_sum import RowIndex, weighted_row_sum


def sample_features(features: Tensor, stride: int, image: Tensor, points: Tensor) -> Tensor:
    """Features at places of the images, interpolated; zero outside.

    Args:
        features: (B, C, H, W), cell (i, j) lying at x = j * stride, y = i * stride.
        image: (N,), in which image the points are.
        points: (N, V, 2) as x, y in pixels of the network's input.

    Returns:
        (N, V, C).
    """
    images, channels, height, width = features.shape
    # Places in half precision would be off by pixels.
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    x, y = (points / stride).unbind(-1)
    pixel, weight = bilinear_corners(y, x, height, width)
    rows = image.to(pixel.dtype)[:, None, None] * (height * width) + pixel
    table = features.permute(0, 2, 3, 1).reshape(-1, channels)
    index = RowIndex(rows.view(-1, 4), images * height * width)
    return weighted_row_sum(table, index, weight.reshape(-1, 4).to(table.dtype)).view(
        *points.shape[:2], channels
    )

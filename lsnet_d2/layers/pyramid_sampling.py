"""Pyramid deformable convolution (paper, section 3.3): sampling at landmarks on three levels.

Every anchor point has K sampling points. The convolution looks at them on the point's own pyramid
level and on two neighbours, with one kernel shared by all levels.

Shapes: B images, L levels, A anchor points of all levels together, level by level and row-major,
K sampling points, C channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .bilinear import bilinear_corners
from .deform_conv import project_taps, tap_offsets
from .levels import expand_levels, flatten_levels, kept_by_size
from .row_sum import RowIndex, weighted_sum_of_made_rows

SOURCES_PER_LEVEL = 3


def source_levels(level: int, num_levels: int) -> tuple[int, int, int]:
    """The levels that a point of ``level`` samples on, its own first (released code's order)."""
    if level == 0:
        return 0, 1, 2
    if level == num_levels - 1:
        return level, level - 1, level - 2
    return level, level - 1, level + 1


@dataclass(frozen=True)
class _Layout:
    """For each anchor point (A,) and each of its three sources (A, 3): the fixed part of sampling.

    ``cell`` (A, 2) x, y; ``size`` (A, 3, 2) and ``scale`` (A, 3, 2): width, height of the source
    map, and relative to the point's own; ``offset_scale`` (A, 3, 2): scale applied to offsets;
    ``first_pixel`` (A, 3): where the source level starts in the list of all pixels of an image.
    """

    cell: Tensor
    size: Tensor
    scale: Tensor
    offset_scale: Tensor
    first_pixel: Tensor


@kept_by_size
def _layout(
    sizes: tuple[tuple[int, int], ...], accumulate_scales: bool, device: torch.device
) -> _Layout:
    sizes_wh = torch.tensor([(w, h) for h, w in sizes])
    pixels = sizes_wh.prod(dim=1)
    first_pixel = pixels.cumsum(0) - pixels
    sources = torch.tensor([source_levels(i, len(sizes)) for i in range(len(sizes))])
    scale = sizes_wh[sources] / sizes_wh[:, None]  # (L, 3, 2)
    offset_scale = scale.cumprod(dim=1) if accumulate_scales else scale
    cells = [
        torch.stack(torch.meshgrid(torch.arange(w), torch.arange(h), indexing="xy"), -1).view(-1, 2)
        for h, w in sizes
    ]
    return _Layout(
        cell=torch.cat(cells).to(device),
        size=expand_levels(sizes_wh[sources], sizes).to(device, torch.int32),
        scale=expand_levels(scale, sizes).to(device),
        offset_scale=expand_levels(offset_scale, sizes).to(device),
        first_pixel=expand_levels(first_pixel[sources], sizes).to(device, torch.int32),
    )


class PyramidGrid:
    """Where all anchor points of a batch sample, on their three levels.

    Args:
        points: (B, A, K, 2), sampling points relative to the anchor point, as x, y in cells of the
            point's own level. Gradients flow into them.
        sizes: (H, W) of each level, at least three.
        reference_offsets: reproduce the released code, in which the scale factors of the offsets
            pile up over the three sources (1, 1/2, 1/8 instead of 1, 1/2, 1/4 on the finest).

    Raises:
        ValueError: there are fewer than three levels, or their cells are not as many as the points.
    """

    def __init__(
        self, points: Tensor, sizes: list[tuple[int, int]], *, reference_offsets: bool = False
    ) -> None:
        if len(sizes) < SOURCES_PER_LEVEL:
            raise ValueError(
                f"pyramid sampling needs at least {SOURCES_PER_LEVEL} levels, got {len(sizes)}"
            )
        images, num_points, taps, _ = points.shape
        if num_points != sum(h * w for h, w in sizes):
            raise ValueError(f"{num_points} sampling points do not fill levels of sizes {sizes}")
        self.sizes = list(sizes)
        layout = _layout(tuple(sizes), reference_offsets, points.device)

        # Places in half precision would be off by cells.
        points = points.to(torch.promote_types(points.dtype, torch.float32))
        # A tap lies at cell * scale + tap * (scale - offset_scale) + point * offset_scale. The
        # middle term is zero but for the released code, which scales offsets *from the taps*.
        scale, offset_scale = (
            t.to(points.dtype)[:, :, None] for t in (layout.scale, layout.offset_scale)
        )
        fixed = layout.cell.to(points.dtype)[:, None, None] * scale
        if reference_offsets:
            kernel = tap_offsets(round(taps**0.5), points.device).to(points.dtype)
            fixed = fixed + kernel * (scale - offset_scale)
        location = fixed + points[:, :, None] * offset_scale  # (B, A, 3, K, 2)

        size = layout.size[:, :, None]
        pixel, weight = bilinear_corners(
            location[..., 1], location[..., 0], size[..., 1], size[..., 0]
        )
        pixels_per_image = sum(h * w for h, w in sizes)
        image = torch.arange(images, dtype=pixel.dtype, device=pixel.device).view(-1, 1, 1, 1, 1)
        first_pixel = layout.first_pixel[:, :, None, None]
        tap = torch.arange(taps, dtype=pixel.dtype, device=pixel.device).view(-1, 1)
        rows = (image * pixels_per_image + first_pixel + pixel) * taps + tap
        self._index = RowIndex(rows.view(-1, 4 * taps), images * pixels_per_image * taps)
        self._weights = weight.reshape(-1, 4 * taps)

    def convolve(self, features: list[Tensor], weight: Tensor) -> Tensor:
        """Sample and convolve.

        Args:
            features: per level (B, C, H, W).
            weight: (C', C, kh, kw) with kh * kw = K.

        Returns:
            (B, A, 3 * C'), the outputs of the three sources one after the other.
        """
        pixels = flatten_levels(features)
        out = weighted_sum_of_made_rows(
            project_taps, (pixels.flatten(0, 1), weight), self._index, self._weights
        )
        return out.view(*pixels.shape[:2], SOURCES_PER_LEVEL * len(weight))


class PyramidDeformConv(nn.Module):
    """The kernel of a pyramid deformable convolution, shared by all levels; no bias.

    Args:
        in_channels, out_channels: C and C'.
        kernel_size: its square is the number of sampling points K.
    """

    def __init__(self, in_channels: int, out_channels: int, *, kernel_size: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features: list[Tensor], grid: PyramidGrid) -> Tensor:
        """Per-level features (B, C, H, W) and a grid to (B, A, 3 * C')."""
        return grid.convolve(features, self.weight)

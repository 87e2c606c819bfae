"""Deformable convolution on any device, without operators of our own.

On CUDA the compiled operators of Detectron2 or torchvision do the work. Elsewhere neither will do:
Detectron2's has no CPU kernel and torchvision's is a serial loop. There the convolution is written
with plain torch operations, as projections of every pixel followed by weighted sums of rows.

Shapes: B images, C input and C' output channels, K = kh * kw taps in row-major order, input size
(H, W), output size (H', W').
"""

import torch
import torch.nn.functional as F
import torchvision.ops
from torch import Tensor, nn

from .bilinear import bilinear_corners
from .row_sum import RowIndex, weighted_row_sum


def tap_offsets(kernel_size: int, device: torch.device | None = None) -> Tensor:
    """Displacement of each tap from the centre of a square kernel, (K, 2) as x, y in pixels."""
    axis = torch.arange(kernel_size, device=device) - (kernel_size - 1) // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1)


def project_taps(pixels: Tensor, weight: Tensor) -> Tensor:
    """Apply each tap of a kernel to every pixel.

    Args:
        pixels: (N, C).
        weight: (C', C, kh, kw).

    Returns:
        (N * K, C'), the taps of a pixel one after the other.
    """
    out_channels, in_channels = weight.shape[:2]
    per_tap = weight.flatten(2).permute(2, 0, 1).reshape(-1, in_channels)
    return F.linear(pixels, per_tap).reshape(-1, out_channels)


def sampled_conv(
    feature: Tensor, weight: Tensor, y: Tensor, x: Tensor, mask: Tensor | None = None
) -> Tensor:
    """A convolution whose taps look at given places, with bilinear interpolation.

    Args:
        feature: (B, C, H, W).
        weight: (C', C, kh, kw).
        y, x: (B, K, H', W'), where each tap samples, in pixels of ``feature``; zero outside.
        mask: (B, K, H', W'), a factor for each sample.

    Returns:
        (B, C', H', W'), in channels-last memory order.
    """
    images, _, height, width = feature.shape
    out_size = y.shape[-2:]
    taps = y.shape[1]
    pixel, corner_weight = bilinear_corners(y, x, height, width)  # (B, K, H', W', 4)
    if mask is not None:
        corner_weight = corner_weight * mask[..., None]
    image = torch.arange(images, dtype=pixel.dtype, device=pixel.device).view(-1, 1, 1, 1, 1)
    tap = torch.arange(taps, dtype=pixel.dtype, device=pixel.device).view(1, -1, 1, 1, 1)
    rows = (image * (height * width) + pixel) * taps + tap

    table = project_taps(feature.permute(0, 2, 3, 1).flatten(0, 2), weight)
    index = RowIndex(rows.permute(0, 2, 3, 1, 4).reshape(-1, taps * 4), len(table))
    weights = corner_weight.permute(0, 2, 3, 1, 4).reshape(-1, taps * 4).to(table.dtype)
    out = weighted_row_sum(table, index, weights)
    return out.view(images, *out_size, len(weight)).permute(0, 3, 1, 2)


def _torch_modulated_deform_conv(feature, offset, mask, weight, bias):
    """Kernel with stride 1 and "same" padding; offsets as (y, x) pairs, taps row-major."""
    images, _, height, width = feature.shape
    tap = tap_offsets(weight.shape[-1], feature.device).to(offset.dtype)
    y = torch.arange(height, dtype=offset.dtype, device=offset.device).view(-1, 1)
    x = torch.arange(width, dtype=offset.dtype, device=offset.device)
    y = offset[:, 0::2] + tap[:, 1].view(1, -1, 1, 1) + y
    x = offset[:, 1::2] + tap[:, 0].view(1, -1, 1, 1) + x
    out = sampled_conv(feature, weight, y, x, mask)
    return out if bias is None else out + bias.view(1, -1, 1, 1)


def _torchvision_modulated_deform_conv(feature, offset, mask, weight, bias):
    padding = (weight.shape[-1] - 1) // 2
    return torchvision.ops.deform_conv2d(feature, offset, weight, bias, padding=padding, mask=mask)


def _detectron2_modulated_deform_conv(feature, offset, mask, weight, bias):
    from detectron2.layers.deform_conv import modulated_deform_conv

    padding = (weight.shape[-1] - 1) // 2
    return modulated_deform_conv(feature, offset, mask, weight, bias, 1, padding, 1, 1, 1)


def _detectron2_has_cuda_operators() -> bool:
    try:
        from detectron2 import _C
    except ImportError:
        return False
    return _C.has_cuda()


def select_implementation(device_type: str, autocast: bool):
    """The function that computes a modulated deformable convolution on a device.

    Detectron2's operator is wrong under autocast, torchvision's is not.
    """
    if device_type != "cuda":
        return _torch_modulated_deform_conv
    if autocast or not _detectron2_has_cuda_operators():
        return _torchvision_modulated_deform_conv
    return _detectron2_modulated_deform_conv


class ModulatedDeformConv(nn.Module):
    """Deformable convolution v2 that predicts its own offsets and masks; stride 1, same size.

    Follows "Deformable ConvNets v2" (arXiv 1811.11168). Offsets and masks start at zero and 1/2.

    Args:
        in_channels, out_channels: C and C'.
        kernel_size: odd size of the square kernel.
        bias: whether to add a learned bias.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel_size: int = 3, bias: bool = True
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        taps = kernel_size**2
        self.conv_offset = nn.Conv2d(
            in_channels, 3 * taps, kernel_size, padding=(kernel_size - 1) // 2
        )
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, feature: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H, W)."""
        offset_and_mask = self.conv_offset(feature)
        taps = offset_and_mask.shape[1] // 3
        offset, mask = offset_and_mask.split([2 * taps, taps], dim=1)
        convolve = select_implementation(
            feature.device.type, torch.is_autocast_enabled(feature.device.type)
        )
        return convolve(feature, offset, mask.sigmoid(), self.weight, self.bias)

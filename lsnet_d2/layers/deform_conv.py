"""Deformable convolution on any device, without operators of our own.

On CUDA the compiled operators of Detectron2 or torchvision do the work. Elsewhere neither will do:
Detectron2's has no CPU kernel and torchvision's is a serial loop. There the convolution is written
with plain torch operations: projections of every pixel followed by weighted sums of rows, or the
other way round where that is less.

Shapes: B images, C input and C' output channels, K = kh * kw taps in row-major order, input size
(H, W), output size (H', W').
"""

from functools import partial

import torch
import torch.nn.functional as F
import torchvision.ops
from torch import Tensor, nn

from .batch_norm import FixedBatchNorm2d
from .bilinear import bilinear_corners
from .row_sum import RowIndex, weighted_row_sum, weighted_sum_of_made_rows


def tap_offsets(kernel_size: int, device: torch.device | None = None) -> Tensor:
    """Displacement of each tap from the centre of a square kernel, (K, 2) as x, y in pixels."""
    axis = torch.arange(kernel_size, device=device) - (kernel_size - 1) // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1)


def project_taps(pixels: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """Apply each tap of a kernel to every pixel.

    Args:
        pixels: (N, C).
        weight: (C', C / groups, kh, kw).

    Returns:
        (N * K, C'), the taps of a pixel one after the other.
    """
    out_channels = len(weight)
    weight = weight.flatten(2)
    if groups == 1:
        per_tap = weight.permute(2, 0, 1).reshape(-1, pixels.shape[1])
        return F.linear(pixels, per_tap).reshape(-1, out_channels)
    pixels = pixels.unflatten(1, (groups, -1)).transpose(0, 1)
    per_tap = weight.unflatten(0, (groups, -1)).permute(0, 2, 3, 1)  # group, C, tap, C'
    projected = torch.bmm(pixels, per_tap.flatten(2)).unflatten(2, (-1, per_tap.shape[3]))
    return projected.permute(1, 2, 0, 3).reshape(-1, out_channels)


def _join_taps(samples: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Samples (M, K, C) and a kernel (C', C / groups, kh, kw) to (M, C')."""
    weight = weight.flatten(2).transpose(1, 2)  # C', tap, C
    if groups == 1:
        return F.linear(samples.flatten(1), weight.flatten(1))
    samples = samples.unflatten(2, (groups, -1)).permute(2, 0, 1, 3).flatten(2)
    weight = weight.flatten(1).unflatten(0, (groups, -1)).transpose(1, 2)
    return torch.bmm(samples, weight).transpose(0, 1).flatten(1)


def sampled_conv(
    feature: Tensor,
    weight: Tensor,
    y: Tensor,
    x: Tensor,
    mask: Tensor | None = None,
    groups: int = 1,
) -> Tensor:
    """A convolution whose taps look at given places, with bilinear interpolation.

    Args:
        feature: (B, C, H, W).
        weight: (C', C / groups, kh, kw).
        y, x: (B, K, H', W'), where each tap samples, in pixels of ``feature``; zero outside.
        mask: (B, K, H', W'), a factor for each sample.
        groups: of the channels, as in :func:`torch.nn.functional.conv2d`.

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
    pixel = (image * (height * width) + pixel).permute(0, 2, 3, 1, 4)  # (B, H', W', K, 4)
    corner_weight = corner_weight.permute(0, 2, 3, 1, 4)

    # Sampling and projection may change places; projecting first is faster and takes less memory,
    # unless there are more pixels than outputs.
    pixels = feature.permute(0, 2, 3, 1).flatten(0, 2)
    if out_size.numel() < height * width:
        index = RowIndex(pixel.reshape(-1, 4), len(pixels))
        weights = corner_weight.reshape(-1, 4).to(pixels.dtype)
        samples = weighted_row_sum(pixels.contiguous(), index, weights)
        out = _join_taps(samples.unflatten(0, (-1, taps)), weight, groups)
    else:
        tap = torch.arange(taps, dtype=pixel.dtype, device=pixel.device).view(-1, 1)
        index = RowIndex((pixel * taps + tap).reshape(-1, taps * 4), len(pixels) * taps)
        out = weighted_sum_of_made_rows(
            partial(project_taps, groups=groups),
            (pixels, weight),
            index,
            corner_weight.reshape(-1, taps * 4),
        )
    return out.view(images, *out_size, len(weight)).permute(0, 3, 1, 2)


def _torch_modulated_deform_conv(feature, offset, mask, weight, bias, stride=1, groups=1):
    """Kernel with "same" padding; offsets as (y, x) pairs, taps row-major."""
    height, width = offset.shape[-2:]
    # Places in half precision would be off by pixels.
    offset = offset.to(torch.promote_types(offset.dtype, torch.float32))
    tap = tap_offsets(weight.shape[-1], feature.device).to(offset.dtype)
    y = stride * torch.arange(height, dtype=offset.dtype, device=offset.device).view(-1, 1)
    x = stride * torch.arange(width, dtype=offset.dtype, device=offset.device)
    y = offset[:, 0::2] + tap[:, 1].view(1, -1, 1, 1) + y
    x = offset[:, 1::2] + tap[:, 0].view(1, -1, 1, 1) + x
    out = sampled_conv(feature, weight, y, x, mask, groups)
    return out if bias is None else out + bias.view(1, -1, 1, 1)


def _torchvision_modulated_deform_conv(feature, offset, mask, weight, bias, stride=1, groups=1):
    # The operator finds the number of groups from the shapes.
    padding = (weight.shape[-1] - 1) // 2
    return torchvision.ops.deform_conv2d(
        feature, offset, weight, bias, stride=stride, padding=padding, mask=mask
    )


def _detectron2_modulated_deform_conv(feature, offset, mask, weight, bias, stride=1, groups=1):
    from detectron2.layers.deform_conv import modulated_deform_conv

    padding = (weight.shape[-1] - 1) // 2
    # Its CUDA operator takes no other memory format.
    feature, offset, mask = (x.contiguous() for x in (feature, offset, mask))
    return modulated_deform_conv(feature, offset, mask, weight, bias, stride, padding, 1, groups, 1)


def _detectron2_has_cuda_operators() -> bool:
    try:
        from detectron2 import _C
    except ImportError:
        return False
    return _C.has_cuda()


def select_implementation(device_type: str, autocast: bool):
    """The function that computes a modulated deformable convolution on a device.

    Detectron2's operator is wrong under autocast, torchvision's is not. The latter is what exported
    models have: ONNX has the same.
    """
    if torch.compiler.is_exporting():
        return _torchvision_modulated_deform_conv
    if device_type != "cuda":
        return _torch_modulated_deform_conv
    if autocast or not _detectron2_has_cuda_operators():
        return _torchvision_modulated_deform_conv
    return _detectron2_modulated_deform_conv


class ModulatedDeformConv(nn.Module):
    """Deformable convolution v2 that predicts its own offsets and masks; "same" padding.

    Follows "Deformable ConvNets v2" (arXiv 1811.11168). Offsets and masks start at zero and 1/2.

    Args:
        in_channels, out_channels: C and C'.
        kernel_size: odd size of the square kernel.
        stride: of the outputs.
        groups: of the channels; offsets and masks are the same for all.
        bias: whether to add a learned bias.
        norm: applied to the output, as in Detectron2's convolutions.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        bias: bool = True,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.groups = groups
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels // groups, kernel_size, kernel_size)
        )
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        taps = kernel_size**2
        self.conv_offset = nn.Conv2d(
            in_channels, 3 * taps, kernel_size, stride=stride, padding=(kernel_size - 1) // 2
        )
        self.norm = norm
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, feature: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H / stride, W / stride), rounded up."""
        offset_and_mask = self.conv_offset(feature)
        taps = offset_and_mask.shape[1] // 3
        offset, mask = offset_and_mask.split([2 * taps, taps], dim=1)
        convolve = select_implementation(
            feature.device.type, torch.is_autocast_enabled(feature.device.type)
        )
        weight, bias, norm = self.weight, self.bias, self.norm
        if isinstance(norm, FixedBatchNorm2d):
            weight, bias = norm.fold(weight, bias)
            norm = None
        out = convolve(feature, offset, mask.sigmoid(), weight, bias, self.stride, self.groups)
        return out if norm is None else norm(out)

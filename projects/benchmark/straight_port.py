"""LSNet's head as a first port of the released code has it, to measure ours against.

Every deformable convolution goes through torchvision's operator. That one knows a single map, so
pyramid sampling is one call for each level and each of its three sources, on maps that are padded
or strided to the size of the level. Weights, outputs and gradients are those of our model; only the
way there differs. This is here for the benchmark and nowhere else.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchvision.ops
from torch import Tensor, nn

from lsnet_d2.layers import ModulatedDeformConv, PyramidDeformConv
from lsnet_d2.layers.deform_conv import tap_offsets
from lsnet_d2.layers.levels import flatten_levels, unflatten_levels
from lsnet_d2.layers.pyramid_sampling import source_levels
from lsnet_d2.modeling import LSNet
from lsnet_d2.modeling.head import HeadOutput, LSNetHead


def straight_port(model: LSNet) -> LSNet:
    """Replace the head and all deformable convolutions of a model, in place; weights are kept.

    Raises:
        ValueError: the head has corner verification or the released code's offsets.
    """
    _replace_layers(model)
    model.head = StraightPortHead(model.head)
    return model


def _replace_layers(module: nn.Module) -> None:
    ports = {ModulatedDeformConv: PlainDeformConv, PyramidDeformConv: PlainPyramidConv}
    for name, child in module.named_children():
        if type(child) in ports:
            setattr(module, name, ports[type(child)](child))
        else:
            _replace_layers(child)


class PlainDeformConv(nn.Module):
    """A :class:`ModulatedDeformConv` by torchvision's operator, with the same parameters."""

    def __init__(self, ours: ModulatedDeformConv) -> None:
        super().__init__()
        self.stride = ours.stride
        self.weight, self.bias = ours.weight, ours.bias
        self.conv_offset, self.norm = ours.conv_offset, ours.norm

    def forward(self, feature: Tensor) -> Tensor:
        predicted = self.conv_offset(feature)
        taps = predicted.shape[1] // 3
        out = torchvision.ops.deform_conv2d(
            feature,
            predicted[:, : 2 * taps],
            self.weight,
            self.bias,
            stride=self.stride,
            padding=(self.weight.shape[-1] - 1) // 2,
            mask=predicted[:, 2 * taps :].sigmoid(),
        )
        return out if self.norm is None else self.norm(out)


@dataclass
class SamplingPoints:
    """Where anchor points sample; what :class:`~lsnet_d2.layers.PyramidGrid` is made from.

    Attributes:
        points: (B, A, K, 2) as x, y in cells, relative to the anchor point.
        sizes: (H, W) of each level.
    """

    points: Tensor
    sizes: list[tuple[int, int]]


class PlainPyramidConv(nn.Module):
    """A :class:`PyramidDeformConv` by torchvision's operator, with the same kernel."""

    def __init__(self, ours: PyramidDeformConv) -> None:
        super().__init__()
        self.weight = ours.weight

    def forward(self, features: list[Tensor], grid: SamplingPoints) -> Tensor:
        """Per-level features (B, C, H, W) to (B, A, 3 * C')."""
        outputs = []
        for level, points in enumerate(unflatten_levels(grid.points.flatten(2), grid.sizes)):
            sources = source_levels(level, len(features))
            samples = [self._sample(features, level, source, points) for source in sources]
            outputs.append(torch.cat(samples, dim=1))
        return flatten_levels(outputs)

    def _sample(self, features: list[Tensor], level: int, source: int, points: Tensor) -> Tensor:
        """The points (B, 2 * K, H, W) of a level on the map of another: (B, C', H, W)."""
        feature = features[source]
        (height, width), (source_height, source_width) = points.shape[-2:], feature.shape[-2:]
        # The operator's output is as large as its input: finer maps are walked in steps, coarser
        # ones padded with the zeros that lie outside of them anyway.
        step = 2 ** max(level - source, 0)
        feature = F.pad(
            feature, (0, max(width - source_width, 0), 0, max(height - source_height, 0))
        )
        tap = tap_offsets(self.weight.shape[-1], points.device).to(points.dtype)
        x, y = points[:, 0::2], points[:, 1::2]
        offset_y = self._offset(y, tap[:, 1], height, source_height, step, vertical=True)
        offset_x = self._offset(x, tap[:, 0], width, source_width, step, vertical=False)
        return torchvision.ops.deform_conv2d(
            feature,
            torch.stack([offset_y, offset_x], dim=2).flatten(1, 2),
            self.weight,
            stride=step,
            padding=(self.weight.shape[-1] - 1) // 2,
        )

    @staticmethod
    def _offset(
        points: Tensor, tap: Tensor, size: int, source_size: int, step: int, *, vertical: bool
    ) -> Tensor:
        """From points (B, K, H, W) of one axis to offsets from where the operator puts its taps."""
        scale = source_size / size
        cell = torch.arange(size, device=points.device, dtype=points.dtype)
        if vertical:
            cell = cell[:, None]
        return (cell + points) * scale - (cell * step + tap[:, None, None])


class StraightPortHead(nn.Module):
    """The layers of an :class:`LSNetHead`, called without anything shared between them."""

    def __init__(self, ours: LSNetHead) -> None:
        super().__init__()
        if ours.corners is not None or ours.reference_offsets:
            raise ValueError("the straight port has neither corner verification nor other offsets")
        self.offset_gradient_mul = ours.offset_gradient_mul
        self.branches = ours.branches
        self.cls_tower = ours.cls_tower
        self.cls_predictor = ours.cls_predictor

    def forward(self, features: list[Tensor]) -> HeadOutput:
        sizes = [tuple(feature.shape[-2:]) for feature in features]
        init, refine = [], []
        for layers in self.branches.values():
            branch_features = layers.tower(features)
            vectors, free = layers.initial(branch_features)
            points = layers.branch.sampling_points(vectors, free)
            points = points.detach().lerp(points, self.offset_gradient_mul)
            grid = SamplingPoints(points, sizes)
            init.append(vectors)
            refine.append(layers.refined(branch_features, grid, vectors))
        logits = self.cls_predictor(self.cls_tower(features), grid)
        return HeadOutput(logits=logits, init=init, refine=refine, sizes=sizes)

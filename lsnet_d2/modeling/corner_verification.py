"""Corner point verification (CPV): maps of the corners of objects, and what they are good for.

Two heat maps say how much a cell looks like the top left or the bottom right corner of an object,
offsets lead to the exact place, and a semantic map says which classes a cell belongs to. Their
features inform classification and the refine stage, they are trained by three losses, and at test
time the corners of boxes move to the hottest cell nearby (RepPoints v2, arXiv 2007.08508; released
code, lscpvnet_head).

Letters: B images, A anchor points of all levels together, C channels, K classes, G objects. Of a
dimension of two corners, index 0 is the top left and 1 the bottom right.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn

from ..layers import corner_pool
from ..layers.levels import flatten_levels
from .blocks import GROUPS, ConvNormAct, Tower, same_conv, set_prior
from .branches import ExtremeBranch
from .corner_targets import corner_targets, semantic_targets
from .distributed import mean_over_workers
from .landmarks import LandmarkBranch
from .losses import gaussian_focal_loss
from .points import AnchorPoints

# Heat and an offset (x, y) for each corner.
EVIDENCE_CHANNELS = 6
# Where the loss of an offset becomes linear, in cells.
OFFSET_BETA = 1 / 9
_EPS = 1e-12


@dataclass
class CornerOutput:
    """Predictions at all anchor points.

    Attributes:
        heat: (B, A, 2) logits.
        offsets: (B, A, 2, 2) as x, y in cells, from the point to the corner.
        semantic: (B, A, K) logits.
    """

    heat: Tensor
    offsets: Tensor
    semantic: Tensor

    def __getitem__(self, image: int) -> "CornerOutput":
        return CornerOutput(self.heat[image], self.offsets[image], self.semantic[image])


@dataclass
class CornerContext:
    """What the other parts of the head get to see, per level.

    Attributes:
        embedding: (B, C, H, W), added to their features.
        evidence: (B, 6, H, W), heat logits and offsets, joined to the features that are sampled.
    """

    embedding: list[Tensor]
    evidence: list[Tensor]

    def add(self, features: list[Tensor]) -> list[Tensor]:
        return [own + shared for own, shared in zip(features, self.embedding, strict=True)]

    def join(self, features: list[Tensor]) -> list[Tensor]:
        return [torch.cat(pair, dim=1) for pair in zip(features, self.evidence, strict=True)]


class CornerPredictor(nn.Module):
    """Heat and offset of one corner, from features pooled along the two sides that meet there."""

    def __init__(
        self, channels: int, sides: tuple[str, str], prior_prob: float, *, pooled_channels: int = 64
    ) -> None:
        super().__init__()
        self.sides = sides
        self.pooled = nn.ModuleList(ConvNormAct(channels, pooled_channels) for _ in sides)
        self.joined = _conv_norm(pooled_channels, channels, 3)
        self.direct = _conv_norm(channels, channels, 1)
        self.fuse = ConvNormAct(channels, channels, 1)
        self.heat = same_conv(channels, 1, 3)
        self.offset = same_conv(channels, 2, 3)
        set_prior(self.heat, prior_prob)

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) to heat (B, 1, H, W) and offset (B, 2, H, W)."""
        pooled = [
            corner_pool(conv(feature), side)
            for conv, side in zip(self.pooled, self.sides, strict=True)
        ]
        joined = self.joined(pooled[0] + pooled[1]) + self.direct(feature)
        fused = self.fuse(F.relu(joined))
        return self.heat(fused), self.offset(fused)


class CornerVerification(nn.Module):
    """The layers: a convolution after the box tower, the semantic map, the two corners."""

    @configurable
    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        tower_conv: str = "dcn",
        num_convs: int = 1,
        prior_prob: float = 0.01,
    ) -> None:
        """
        Args:
            in_channels: C, a multiple of 32.
            num_classes: K.
            tower_conv: "dcn" or "conv".
            num_convs: convolutions between the tower of the boxes and the maps.
            prior_prob: heat and semantic scores before training.
        """
        super().__init__()
        self.tower = Tower(in_channels, num_convs, tower_conv)
        self.semantic = same_conv(in_channels, num_classes, 1)
        self.embedding = ConvNormAct(in_channels, in_channels, 1)
        self.top_left = CornerPredictor(in_channels, ("top", "left"), prior_prob)
        self.bottom_right = CornerPredictor(in_channels, ("bottom", "right"), prior_prob)
        set_prior(self.semantic, prior_prob)

    @classmethod
    def from_config(cls, cfg: CfgNode, in_channels: int, branches: list[LandmarkBranch]) -> dict:
        """
        Raises:
            ValueError: the boxes are not between extreme points, or a third stage moves them; the
                message names the keys.
        """
        if not isinstance(branches[0], ExtremeBranch):
            raise ValueError(
                "MODEL.LSNET.CPV is True, but it verifies boxes between extreme points: "
                f"MODEL.LSNET.TASK {cfg.MODEL.LSNET.TASK!r} takes its boxes from other landmarks"
            )
        if cfg.MODEL.LSNET.POLISH_IN_FEATURES:
            raise ValueError(
                "MODEL.LSNET.CPV is True and MODEL.LSNET.POLISH_IN_FEATURES is "
                f"{list(cfg.MODEL.LSNET.POLISH_IN_FEATURES)}; only one of the two can have the "
                "last word on where a box ends"
            )
        return {
            "in_channels": in_channels,
            "num_classes": cfg.MODEL.LSNET.NUM_CLASSES,
            "tower_conv": cfg.MODEL.LSNET.TOWER_CONV,
            "prior_prob": cfg.MODEL.LSNET.PRIOR_PROB,
        }

    def forward(self, features: list[Tensor]) -> tuple[CornerOutput, CornerContext]:
        """From the features of the boxes' tower, per level (B, C, H, W)."""
        features = self.tower(features)
        embedding = [self.embedding(feature) for feature in features]
        evidence = []
        for feature, embedded in zip(features, embedding, strict=True):
            corners = [corner(feature + embedded) for corner in (self.top_left, self.bottom_right)]
            heat, offsets = zip(*corners, strict=True)
            evidence.append(torch.cat([*heat, *offsets], dim=1))
        heat, offsets = flatten_levels(evidence).split([2, 4], dim=2)
        output = CornerOutput(
            heat=heat,
            offsets=offsets.unflatten(2, (2, 2)),
            semantic=flatten_levels([self.semantic(feature) for feature in features]),
        )
        return output, CornerContext(embedding, evidence)


def _conv_norm(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    return nn.Sequential(
        same_conv(in_channels, out_channels, kernel_size, bias=False),
        nn.GroupNorm(GROUPS, out_channels),
    )


class CornerCriterion:
    """The losses of corner verification."""

    @configurable
    def __init__(
        self,
        *,
        loss_weights: Sequence[float] = (0.25, 1.0, 0.1),
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
    ) -> None:
        """
        Args:
            loss_weights: of heat maps, offsets and semantic map.
            focal_loss_alpha, focal_loss_gamma: of the semantic map.

        Raises:
            ValueError: there are not three weights.
        """
        if len(loss_weights) != 3:
            raise ValueError(
                f"MODEL.LSNET.CPV_LOSS_WEIGHTS is {list(loss_weights)}; it must have three values, "
                "for heat maps, offsets and the semantic map"
            )
        self.loss_weights = loss_weights
        self.focal_loss_alpha = focal_loss_alpha
        self.focal_loss_gamma = focal_loss_gamma

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return {
            "loss_weights": cfg.MODEL.LSNET.CPV_LOSS_WEIGHTS,
            "focal_loss_alpha": cfg.MODEL.LSNET.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": cfg.MODEL.LSNET.FOCAL_LOSS_GAMMA,
        }

    def __call__(
        self,
        points: AnchorPoints,
        output: CornerOutput,
        boxes: list[Tensor],
        classes: list[Tensor],
        valid: Tensor,
        ignored: Tensor,
    ) -> dict[str, Tensor]:
        """Losses by name, each a scalar with its weight.

        Args:
            boxes: per image (G, 4) XYXY.
            classes: per image (G,).
            valid: (B, A) bool, points on the image and on its own padding.
            ignored: (B, A) bool, points that are no background.
        """
        num_classes = output.semantic.shape[2]
        corners = [corner_targets(points, *image) for image in zip(boxes, valid, strict=True)]
        heat, offsets = (torch.stack(maps) for maps in zip(*corners, strict=True))
        semantic = torch.stack(
            [
                semantic_targets(points, *image, num_classes)
                for image in zip(boxes, classes, valid, strict=True)
            ]
        )
        positive, background = heat == 1, ~ignored[..., None]
        # Each corner has its own normalizer: the number of positives, at least one an image.
        normalizer = mean_over_workers(positive.sum(dim=1).clamp(min=1).sum(dim=0).float())
        heat_loss = gaussian_focal_loss(output.heat.float(), heat)
        heat_loss = heat_loss * valid[..., None] * (positive | background)
        offset_loss = F.smooth_l1_loss(
            output.offsets.float(), offsets, reduction="none", beta=OFFSET_BETA
        )
        offset_loss = offset_loss * positive[..., None]
        losses = {
            "loss_heatmap": (heat_loss.sum(dim=(0, 1)) / normalizer).mean(),
            "loss_offset": (offset_loss.sum(dim=(0, 1, 3)) / normalizer).mean(),
            "loss_sem": self.semantic_loss(output.semantic.float(), semantic, background),
        }
        weights = zip(losses, self.loss_weights, strict=True)
        return {name: weight * losses[name] for name, weight in weights}

    def semantic_loss(self, logits: Tensor, weights: Tensor, background: Tensor) -> Tensor:
        """Focal loss of the semantic map.

        Cells of objects are averaged with their weights. All others, also those outside of the
        image, are divided by the number of the former; where there are none, the loss is 0.

        Args:
            logits: (B, A, K).
            weights: (B, A, K), see :func:`~.corner_targets.semantic_targets`.
            background: (B, A, 1) bool, points that teach what they do not belong to.
        """
        covered = weights > 0
        weight, count = mean_over_workers(torch.stack([weights.sum(), covered.sum()]))
        loss = sigmoid_focal_loss(
            logits,
            covered.to(logits),
            alpha=self.focal_loss_alpha,
            gamma=self.focal_loss_gamma,
        )
        of_objects = (loss * weights).sum() / weight.clamp(min=_EPS)
        of_others = (loss * (background & ~covered)).sum() / count.clamp(min=_EPS)
        return (count > 0) * (of_objects + of_others)


def snap_boxes(boxes: Tensor, levels: Tensor, points: AnchorPoints, output: CornerOutput) -> Tensor:
    """Move the corners of boxes to the hottest of the four cells around them, and its offset.

    As in the released code boxes of the finest level stay, those of the next two look at the
    finest heat map, those of the two after that at the second, and so on: nothing asks whether the
    heat is high.

    Args:
        boxes: (N, 4) XYXY in image pixels, on the image.
        levels: (N,), of their anchor points, 0 the finest.
        output: of this image, (A, ...).

    Returns:
        (N, 4); they may reach over the image's border.
    """
    source = ((levels - 1) // 2).clamp(min=0)
    per_level = torch.tensor(points.per_level, device=boxes.device)
    first = (per_level.cumsum(0) - per_level)[source]  # (N,)
    size = torch.tensor([(w, h) for h, w in points.sizes], device=boxes.device)[source]
    stride = points.strides[first]

    corners = boxes.view(-1, 2, 1, 2)  # N, corner, cell of the window, x and y
    last = (size - 1)[:, None, None]
    cell = (corners / stride[:, None, None, None]).floor().long()
    # The window begins at the corner's own cell, or so that it ends with the map.
    cell = torch.minimum(cell, last - 1).clamp(min=0)
    window = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]], device=boxes.device)
    x, y = torch.minimum(cell + window, last).unbind(-1)  # (N, 2, 4)
    candidates = first[:, None, None] + y * size[:, :1, None] + x
    which = torch.arange(2, device=boxes.device)[:, None]
    best = output.heat[candidates, which].argmax(dim=2, keepdim=True)
    chosen = candidates.gather(2, best).squeeze(2)  # (N, 2)
    offsets = output.offsets[chosen, which[:, 0]].to(boxes)
    snapped = points.xy[chosen] + stride[:, None, None] * offsets
    return torch.where(levels[:, None] > 0, snapped.flatten(1), boxes)

"""LSNet's head: towers, initial landmark vectors, sampling at them, refined vectors and classes.

Letters: B images, L pyramid levels, A anchor points of all levels together (level by level and
row-major), C channels, K classes, V landmarks of a branch.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ..layers import PyramidDeformConv, PyramidGrid
from ..layers.levels import flatten_levels, unflatten_levels
from ..layers.pyramid_sampling import SOURCES_PER_LEVEL
from .blocks import GROUPS, Tower, same_conv, set_prior
from .corner_verification import EVIDENCE_CHANNELS, CornerOutput, CornerVerification
from .landmarks import LandmarkBranch
from .vectors import COMPONENTS


@dataclass
class HeadOutput:
    """Predictions at all anchor points.

    Attributes:
        logits: (B, A, K).
        init, refine: per branch (B, A, V + 1, 4), landmark vectors in cells of the point's level.
        sizes: (H, W) of each level.
        corners: what corner verification predicts, if there is any.
    """

    logits: Tensor
    init: list[Tensor]
    refine: list[Tensor]
    sizes: list[tuple[int, int]]
    corners: CornerOutput | None = None


class RefinePredictor(nn.Module):
    """Predictions from the point's own surroundings and, if sampled, from three levels.

    The samples of the three levels are fused by a 1x1 convolution and added to a 3x3 convolution
    of the own level (released code: af_dcn_conv, feat_conv).
    """

    def __init__(
        self, in_channels: int, channels: int, out_channels: int, *, sampled: bool = True
    ) -> None:
        super().__init__()
        self.sample = self.fuse = None
        if sampled:
            self.sample = PyramidDeformConv(in_channels, channels)
            self.fuse = same_conv(SOURCES_PER_LEVEL * channels, channels, 1)
        self.local = same_conv(in_channels, channels, 3)
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.out = same_conv(channels, out_channels, 1)

    def forward(self, features: list[Tensor], grid: PyramidGrid | None) -> Tensor:
        """Per level (B, in_channels, H, W) to (B, A, out_channels)."""
        joined = [self.local(feature) for feature in features]
        if self.sample is not None:
            levels = unflatten_levels(self.sample(features, grid), grid.sizes)
            joined = [
                F.relu(self.fuse(sampled)) + own
                for sampled, own in zip(levels, joined, strict=True)
            ]
        return flatten_levels([self.out(F.relu(self.norm(level))) for level in joined])


class BranchLayers(nn.Module):
    """The layers of one landmark branch: tower, initial vectors, refined vectors."""

    def __init__(
        self,
        branch: LandmarkBranch,
        channels: int,
        num_convs: int,
        kind: str,
        *,
        extra_channels: int = 0,
        sampled: bool = True,
    ) -> None:
        """
        Args:
            extra_channels: that the refine stage gets besides those of the tower.
            sampled: whether it samples at the initial landmarks.
        """
        super().__init__()
        self.branch = branch
        self.vector_channels = COMPONENTS * branch.num_vectors
        self.tower = Tower(channels, num_convs, kind)
        self.init_conv = same_conv(channels, channels, 3)
        # Free sampling points are predicted as (y, x), after the vectors.
        self.init_out = same_conv(channels, self.vector_channels + 2 * branch.num_free_points, 1)
        self.refine = RefinePredictor(
            channels + extra_channels, channels, self.vector_channels, sampled=sampled
        )

    def initial(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Initial vectors (B, A, V + 1, 4), and free sampling points (B, A, F, 2) as x, y, in
        cells."""
        raw = flatten_levels([self.init_out(F.relu(self.init_conv(f))) for f in features])
        vectors, free = raw.tensor_split([self.vector_channels], dim=2)
        vectors = F.softplus(_at_least_single(vectors)).unflatten(2, (-1, COMPONENTS))
        return vectors, free.unflatten(2, (self.branch.num_free_points, 2)).flip(-1)

    def refined(self, features: list[Tensor], grid: PyramidGrid | None, vectors: Tensor) -> Tensor:
        """Refined vectors (B, A, V + 1, 4): a residual on the initial ones."""
        residual = self.refine(features, grid).view_as(vectors)
        return F.softplus(_at_least_single(residual) + vectors.detach())


def _at_least_single(raw: Tensor) -> Tensor:
    """What autocast does to softplus's input on CUDA, but not on CPUs. With the 8 bits of bfloat16
    boxes would often have no size at all, and the gradient of their proportions no bounds."""
    return raw.to(torch.promote_types(raw.dtype, torch.float32))


class LSNetHead(nn.Module):
    """A tower for classes, one for each landmark branch, and sampling at the landmarks between.

    Each branch samples at its own landmarks, the classes where the last branch does. Corner
    verification informs the classes and the first branch, whose boxes it verifies.
    """

    @configurable
    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        branches: list[LandmarkBranch],
        corners: CornerVerification | None = None,
        tower_conv: str = "dcn",
        num_convs: int = 3,
        prior_prob: float = 0.01,
        sampling: bool = True,
        reference_offsets: bool = False,
        offset_gradient_mul: float = 0.1,
    ) -> None:
        """
        Args:
            in_channels: C, a multiple of 32, at least 64.
            num_classes: K.
            branches: landmark branches, at least one.
            corners: corner verification, with the same C and K; None: nothing is verified.
            tower_conv: "dcn" or "conv".
            num_convs: convolutions of each tower.
            prior_prob: score of every class before training.
            sampling: whether the refine stage and the classes sample at the initial landmarks.
            reference_offsets: see :class:`~lsnet_d2.layers.PyramidGrid`.
            offset_gradient_mul: factor on the gradient from sampling places to initial vectors.

        Raises:
            ValueError: the number of channels is none of those, or ``tower_conv`` is unknown.
        """
        super().__init__()
        if in_channels % GROUPS or in_channels == GROUPS:
            # with one channel a group, the norm of a level of one cell is undefined
            raise ValueError(
                f"the head needs a larger multiple of {GROUPS} channels "
                f"(MODEL.FPN.OUT_CHANNELS), got {in_channels}"
            )
        self.sampling = sampling
        self.reference_offsets = reference_offsets
        self.offset_gradient_mul = offset_gradient_mul
        self.cls_tower = Tower(in_channels, num_convs, tower_conv)
        extra = EVIDENCE_CHANNELS if corners else 0
        self.cls_predictor = RefinePredictor(
            in_channels + extra, in_channels, num_classes, sampled=sampling
        )
        self.branches = nn.ModuleDict()
        for branch in branches:
            self.branches[branch.name] = BranchLayers(
                branch,
                in_channels,
                num_convs,
                tower_conv,
                extra_channels=extra,
                sampled=sampling,
            )
            extra = 0
        self.corners = corners
        set_prior(self.cls_predictor.out, prior_prob)

    @classmethod
    def from_config(
        cls, cfg: CfgNode, input_shape: list[ShapeSpec], branches: list[LandmarkBranch]
    ) -> dict:
        channels = {shape.channels for shape in input_shape}
        if len(channels) != 1:
            raise ValueError(f"all levels must have the same number of channels, got {channels}")
        (channels,) = channels
        corners = CornerVerification(cfg, channels, branches) if cfg.MODEL.LSNET.CPV else None
        return {
            "in_channels": channels,
            "num_classes": cfg.MODEL.LSNET.NUM_CLASSES,
            "branches": branches,
            "corners": corners,
            "tower_conv": cfg.MODEL.LSNET.TOWER_CONV,
            "num_convs": cfg.MODEL.LSNET.NUM_CONVS,
            "prior_prob": cfg.MODEL.LSNET.PRIOR_PROB,
            "sampling": cfg.MODEL.LSNET.REFINE_SAMPLING,
            "reference_offsets": cfg.MODEL.LSNET.REFERENCE_OFFSETS,
            "offset_gradient_mul": cfg.MODEL.LSNET.OFFSET_GRADIENT_MUL,
        }

    def forward(self, features: list[Tensor]) -> HeadOutput:
        """Per-level features (B, C, H, W), finest first."""
        sizes = [tuple(feature.shape[-2:]) for feature in features]
        init, refine = [], []
        corners = context = grid = None
        for layers in self.branches.values():
            branch_features = sampled = layers.tower(features)
            if self.corners is not None and corners is None:  # the first branch
                corners, context = self.corners(branch_features)
                branch_features = context.add(branch_features)
                sampled = context.join(branch_features)
            vectors, free = layers.initial(branch_features)
            if self.sampling:
                points = layers.branch.sampling_points(vectors, free)
                points = points.detach().lerp(points, self.offset_gradient_mul)
                grid = PyramidGrid(points, sizes, reference_offsets=self.reference_offsets)
            init.append(vectors)
            refine.append(layers.refined(sampled, grid, vectors))
        cls_features = self.cls_tower(features)
        if context is not None:
            cls_features = context.join(context.add(cls_features))
        logits = self.cls_predictor(cls_features, grid)
        return HeadOutput(logits=logits, init=init, refine=refine, sizes=sizes, corners=corners)

"""A third stage, on chosen points only: every landmark is moved by what the image shows there.

The paper's two stages predict all landmarks of an anchor point at once, and the second one looks at
nine places. Here each landmark is a token: the features under it, where it is in the object, and
which one it is. Self-attention (arXiv 1706.03762) lets the tokens of an object agree, and each then
says how far it moves. Landmarks see little of what lies between them, so a grid of points in the
object's box may be among the tokens. That is done in steps with weights of their own: the better
the landmarks are, the more the features under them say (as in Deep Snake, arXiv 2001.01629).
Together the tokens say how good the landmarks are now, for each class that the object may be of,
for the score of the detection (as in Mask Scoring R-CNN, arXiv 1903.00241, and like the second look
that R-CNNs have). Since it runs on a few points of training and on final detections alone, it costs
little, and two convolutions of the features that it looks at where outlines teach these
(:mod:`.outlines`) or landmarks are sought on them (:mod:`.search`).

Letters: N points, V landmarks, C channels, K classes.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ..layers import sample_features
from .blocks import ConvNormAct, same_conv, set_prior
from .landmarks import DISPLACEMENT_UNIT, LandmarkBranch
from .outlines import OutlineMaps
from .points import square_lattice
from .search import LandmarkSearch, SearchResult

_HEADS = 4
_QUALITY_BEFORE_TRAINING = 0.2
# How far landmarks are sought, in sizes of the object; in each further step half as far.
_REACH = 0.3
# On the finest features, where outlines teach them or landmarks are sought on them.
_NUM_CONVS = 2


class Polished(NamedTuple):
    """What a step makes of N points.

    Attributes:
        landmarks: (N, V, 2), moved.
        quality: (N, K) as logits: that of landmarks of an object of each class, 0 if it is of
            another; see :meth:`.LandmarkBranch.quality`.
        search: where the landmarks were found, if they were sought.
    """

    landmarks: Tensor
    quality: Tensor
    search: SearchResult | None


class PolishStep(nn.Module):
    """Moves the landmarks of one branch once, and says how good they are then."""

    def __init__(
        self,
        num_landmarks: int,
        in_channels: int,
        strides: list[int],
        num_classes: int,
        *,
        channels: int = 64,
        num_layers: int = 2,
        grid: int = 0,
        reach: float | None = None,
    ) -> None:
        """
        Args:
            num_landmarks: V.
            in_channels: of all feature maps together.
            strides: of the feature maps.
            num_classes: K.
            channels: width of the tokens, a multiple of 4.
            num_layers: of self-attention.
            grid: rows and columns of the points in the object's box that are looked at, too.
            reach: how far landmarks are sought, in sizes of the object; None: they are not.
        """
        super().__init__()
        self.strides = strides
        self.appearance = nn.Linear(in_channels, channels)
        self.place = nn.Linear(2, channels)
        self.search = LandmarkSearch(num_landmarks, reach) if reach else None
        self.guidance = nn.Linear(3, channels) if reach else None
        self.identity = nn.Parameter(torch.randn(num_landmarks + grid**2, channels) * 0.02)
        self.register_buffer("grid", _grid_in_box(grid), persistent=False)
        layer = nn.TransformerEncoderLayer(
            channels, _HEADS, 2 * channels, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(channels)
        self.out = nn.Linear(channels, 2)
        self.trust = nn.Linear(channels, 1) if reach else None
        self.quality = nn.Linear(channels, num_classes)
        set_prior(self.quality, _QUALITY_BEFORE_TRAINING)
        # At first nothing moves, but to where the search leads.
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self,
        features: list[Tensor],
        image: Tensor,
        landmarks: Tensor,
        heatmaps: Tensor | None = None,
    ) -> Polished:
        """
        Args:
            features: per stride (B, C, H, W).
            image: (N,), in which image the points are.
            landmarks: (N, V, 2) in pixels of the network's input.
            heatmaps: (B, V, H, W), on which they are sought, if they are; of the first stride.
        """
        low, high = landmarks.amin(dim=1), landmarks.amax(dim=1)
        size = (high - low).norm(dim=1).clamp(min=1)[:, None, None]
        middle = ((low + high) / 2)[:, None]
        points = torch.cat([landmarks, middle + (high - low)[:, None] * self.grid], dim=1)
        place = (points - middle) / size
        sampled = torch.cat(
            [
                sample_features(feature, stride, image, points)
                for feature, stride in zip(features, self.strides, strict=True)
            ],
            dim=2,
        )
        tokens = self.appearance(sampled) + self.place(place.to(sampled)) + self.identity
        count = landmarks.shape[1]
        found = way = None
        if self.search is not None:
            found = self.search(heatmaps, self.strides[0], image, landmarks, size)
            offset, confidence = found.expectation()
            way = offset / DISPLACEMENT_UNIT
            seen = torch.cat([confidence, way], dim=2).to(tokens)
            guided = tokens[:, :count] + self.guidance(seen)
            tokens = torch.cat([guided, tokens[:, count:]], dim=1)
        tokens = self.norm(self.layers(tokens))
        moving = tokens[:, :count]
        moves = self.out(moving)
        if way is not None:
            moves = moves + self.trust(moving).sigmoid() * way
        moved = landmarks + DISPLACEMENT_UNIT * size * moves.to(landmarks)
        return Polished(moved, self.quality(tokens.mean(dim=1)), found)


class LandmarkPolish(nn.Module):
    """Moves the landmarks of one branch, step by step."""

    def __init__(
        self,
        num_landmarks: int,
        in_channels: int,
        strides: list[int],
        num_classes: int,
        *,
        num_steps: int = 1,
        grid: int = 0,
        searchable: bool = False,
    ) -> None:
        """
        Args:
            num_landmarks, in_channels, strides, num_classes, grid: see :class:`PolishStep`.
            num_steps: at least 1.
            searchable: whether landmarks are sought.
        """
        super().__init__()
        self.steps = nn.ModuleList(
            PolishStep(
                num_landmarks,
                in_channels,
                strides,
                num_classes,
                grid=grid,
                reach=_REACH / 2**step if searchable else None,
            )
            for step in range(num_steps)
        )

    def forward(
        self,
        features: list[Tensor],
        image: Tensor,
        landmarks: Tensor,
        heatmaps: Tensor | None = None,
    ) -> list[Polished]:
        """
        Args:
            features, image, landmarks, heatmaps: see :meth:`PolishStep.forward`.

        Returns:
            What each step makes of them. No gradient flows from a step to those before.
        """
        moved = []
        for step in self.steps:
            moved.append(step(features, image, landmarks, heatmaps))
            landmarks = moved[-1].landmarks.detach()
        return moved


class Polish(nn.Module):
    """The third stage of all branches.

    Attributes:
        branches: what moves the landmarks of each branch, by its name.
        outlines: of the branches that have any, what they teach the finest features.
        heatmaps: of those whose landmarks are sought, what makes the maps for it.
    """

    def __init__(
        self,
        in_features: Sequence[str],
        branches: Mapping[str, LandmarkPolish],
        convs: Sequence[nn.Module] = (),
        outlines: Mapping[str, OutlineMaps] | None = None,
        heatmaps: Mapping[str, nn.Module] | None = None,
    ) -> None:
        """
        Args:
            in_features: names of the feature maps that are looked at, finest first.
            convs: what the finest goes through before.
            branches, outlines, heatmaps: see the class.
        """
        super().__init__()
        self.in_features = list(in_features)
        self.branches = nn.ModuleDict(branches)
        self.convs = nn.Sequential(*convs)
        self.outlines = nn.ModuleDict(outlines or {})
        self.heatmaps = nn.ModuleDict(heatmaps or {})

    def features(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """The maps to look at, each (B, C, H, W), from those of the backbone."""
        finest, *others = (features[name] for name in self.in_features)
        return [self.convs(finest), *others]

    def forward(
        self, name: str, features: list[Tensor], image: Tensor, landmarks: Tensor
    ) -> list[Polished]:
        """As :meth:`LandmarkPolish.forward`, of the branch of this name.

        Args:
            features: of :meth:`features`.
        """
        heatmaps = self.heatmaps[name](features[0]) if name in self.heatmaps else None
        return self.branches[name](features, image, landmarks, heatmaps)


def _grid_in_box(count: int) -> Tensor:
    """(count * count, 2): the middles of the cells of a box from -0.5 to 0.5, row by row."""
    ticks = (torch.arange(count) + 0.5) / max(count, 1) - 0.5
    return square_lattice(ticks)


def build_polish(
    cfg: CfgNode, shapes: Mapping[str, ShapeSpec], branches: list[LandmarkBranch]
) -> Polish | None:
    """None without ``MODEL.LSNET.POLISH_IN_FEATURES``.

    Args:
        shapes: of the backbone's features.

    Raises:
        ValueError: the backbone has no such feature, or there is no such number of steps, grid, or
            share of the quality; the message names the key.
    """
    node = cfg.MODEL.LSNET
    names = list(node.POLISH_IN_FEATURES)
    if not names:
        return None
    if set(names) - set(shapes):
        raise ValueError(
            f"MODEL.LSNET.POLISH_IN_FEATURES is {names}; the backbone has {', '.join(shapes)}"
        )
    if node.POLISH_STEPS < 1:
        raise ValueError(f"MODEL.LSNET.POLISH_STEPS is {node.POLISH_STEPS}; it must be positive")
    if node.POLISH_GRID < 0:
        raise ValueError(f"MODEL.LSNET.POLISH_GRID is {node.POLISH_GRID}; it must not be negative")
    if not 0 <= node.QUALITY_SHARE_TEST <= 1:
        raise ValueError(
            f"MODEL.LSNET.QUALITY_SHARE_TEST is {node.QUALITY_SHARE_TEST}; it must be from 0 to 1"
        )
    finest = shapes[names[0]]
    outlined = [b for b in branches if b.outlined and node.OUTLINE_MAPS]
    searchable = [b for b in branches if b.searchable and node.KEYPOINT_SEARCH]
    polished = {
        branch.name: LandmarkPolish(
            branch.num_landmarks,
            sum(shapes[name].channels for name in names),
            [shapes[name].stride for name in names],
            node.NUM_CLASSES,
            num_steps=node.POLISH_STEPS,
            grid=node.POLISH_GRID,
            searchable=branch in searchable,
        )
        for branch in branches
    }
    num_convs = _NUM_CONVS if outlined or searchable else 0
    convs = [ConvNormAct(finest.channels, finest.channels) for _ in range(num_convs)]
    outlines = {
        branch.name: OutlineMaps(
            channels=finest.channels,
            num_classes=node.NUM_CLASSES,
            stride=finest.stride,
            loss_weights=node.OUTLINE_MAPS_LOSS_WEIGHTS,
        )
        for branch in outlined
    }
    heatmaps = {b.name: same_conv(finest.channels, b.num_landmarks, 1) for b in searchable}
    return Polish(names, polished, convs, outlines, heatmaps)

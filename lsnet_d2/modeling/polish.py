"""A third stage, on chosen points only: every landmark is moved by what the image shows there.

The paper's two stages predict all landmarks of an anchor point at once, and the second one looks at
nine places. Here each landmark is a token: the features under it, where it is in the object, and
which one it is. Self-attention (arXiv 1706.03762) lets the tokens of an object agree, those of all
branches together, and each then says how far it moves. Landmarks see little of what lies between
them, so a grid of points in the object's box may be among the tokens. That is done in steps with
weights of their own: the better the landmarks are, the more the features under them say (as in Deep
Snake, arXiv 2001.01629). The tokens of a branch say together how good its landmarks are now, for
each class that the object may be of, for the score of the detection (as in Mask Scoring R-CNN,
arXiv 1903.00241, and like the second look that R-CNNs have). Since it runs on a few points of
training and on final detections alone, it costs little, and two convolutions of the features that
it looks at where outlines teach these (:mod:`.outlines`) or landmarks are sought on them
(:mod:`.search`), whose maps may have more of their own.

Letters: N points, V landmarks, C channels, K classes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ..layers import PointSampler
from .blocks import plain_convs, same_conv, set_prior
from .landmarks import DISPLACEMENT_UNIT, LandmarkBranch
from .mask_head import LatticeMasks, MaskHead
from .outlines import OutlineMaps
from .points import square_lattice
from .search import LandmarkSearch, SearchResult

_CHANNELS = 64
_HEADS = 4
_QUALITY_BEFORE_TRAINING = 0.2
# How far landmarks are sought, in sizes of the object; in each further step half as far.
_REACH = 0.3
# How far from the middle of an object its landmarks count as being, in sizes.
_FARTHEST = 2.0
# On the finest features, where outlines teach them or landmarks are sought on them.
_NUM_CONVS = 2


class Polished(NamedTuple):
    """What a step makes of N points.

    Attributes:
        landmarks: (N, V, 2), moved.
        quality: (N, K) as logits: that of landmarks of an object of each class, 0 if it is of
            another; see :meth:`.LandmarkBranch.quality`.
        search: where the landmarks were found, if they were sought.
        summary: (N, C), what the tokens say together, of which quality is read.
    """

    landmarks: Tensor
    quality: Tensor
    search: SearchResult | None
    summary: Tensor


class LandmarkTokens(nn.Module):
    """What a step has of one branch's own: who its tokens are, and what is read from them."""

    def __init__(
        self, num_landmarks: int, channels: int, num_classes: int, reach: float | None = None
    ) -> None:
        """
        Args:
            num_landmarks: V.
            channels: C, width of the tokens.
            num_classes: K.
            reach: how far landmarks are sought, in sizes of the object; None: they are not.
        """
        super().__init__()
        self.identity = nn.Parameter(torch.randn(num_landmarks, channels) * 0.02)
        self.search = LandmarkSearch(num_landmarks, reach) if reach else None
        self.guidance = nn.Linear(3, channels) if reach else None
        self.trust = nn.Linear(channels, 1) if reach else None
        self.out = nn.Linear(channels, 2)
        self.quality = nn.Linear(channels, num_classes)
        set_prior(self.quality, _QUALITY_BEFORE_TRAINING)
        # At first nothing moves, but to where the search leads.
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def guide(self, search: SearchResult) -> tuple[Tensor, Tensor]:
        """What a search adds to the tokens (N, V, C), and the moves (N, V, 2) that it suggests."""
        offset, confidence = search.expectation()
        moves = offset / DISPLACEMENT_UNIT
        seen = torch.cat([confidence, moves], dim=2)
        return self.guidance(seen.to(self.guidance.weight)), moves

    def moves(self, tokens: Tensor, suggested: Tensor | None) -> Tensor:
        """(N, V, 2), in units of DISPLACEMENT_UNIT sizes of the object.

        Args:
            tokens: (N, V, C), after attention.
            suggested: (N, V, 2), by the search, if there is one.
        """
        moves = self.out(tokens)
        if suggested is not None:
            moves = moves + self.trust(tokens).sigmoid() * suggested
        return moves


class PolishStep(nn.Module):
    """Moves the landmarks of all branches once, and says how good they are then."""

    def __init__(
        self,
        num_landmarks: Mapping[str, int],
        in_channels: int,
        num_classes: int,
        *,
        stride: int = 1,
        channels: int = _CHANNELS,
        num_layers: int = 2,
        grid: int = 0,
        reach: Mapping[str, float] | None = None,
    ) -> None:
        """
        Args:
            num_landmarks: V of each branch, by its name; the first one's span the object.
            in_channels: of all feature maps together.
            num_classes: K.
            stride: of the maps on which landmarks are sought, if any are.
            channels: width of the tokens, a multiple of 4.
            num_layers: of self-attention.
            grid: rows and columns of the points in the object's box that are looked at, too.
            reach: of the branches whose landmarks are sought, how far, in sizes of the object.
        """
        super().__init__()
        self.stride = stride
        self.appearance = nn.Linear(in_channels, channels)
        self.place = nn.Linear(2, channels)
        self.branches = nn.ModuleDict(
            {
                name: LandmarkTokens(number, channels, num_classes, (reach or {}).get(name))
                for name, number in num_landmarks.items()
            }
        )
        identity = nn.Parameter(torch.randn(grid**2, channels) * 0.02) if grid else None
        self.register_parameter("grid_identity", identity)
        self.register_buffer("grid", _grid_in_box(grid), persistent=False)
        layer = nn.TransformerEncoderLayer(
            channels, _HEADS, 2 * channels, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(channels)

    def forward(
        self,
        features: PointSampler,
        image: Tensor,
        landmarks: Sequence[Tensor],
        heatmaps: Mapping[str, Tensor] | None = None,
    ) -> list[Polished]:
        """
        Args:
            features: reads all maps that are looked at.
            image: (N,), in which image the points are.
            landmarks: of each branch (N, V, 2) in pixels of the network's input.
            heatmaps: by the branch's name (B, V, H, W), on which its landmarks are sought.

        Returns:
            What becomes of those of each branch.
        """
        low, high = landmarks[0].amin(dim=1), landmarks[0].amax(dim=1)
        size = (high - low).norm(dim=1).clamp(min=1)[:, None, None]
        middle = ((low + high) / 2)[:, None]
        grid = middle + (high - low)[:, None] * self.grid
        points = torch.cat([*landmarks, grid], dim=1)
        sampled = features(image, points)
        # What is far from the object, as in a hard negative, must not outweigh all else.
        place = ((points - middle) / size).clamp(-_FARTHEST, _FARTHEST).to(sampled)
        identity = [branch.identity for branch in self.branches.values()]
        if self.grid_identity is not None:
            identity.append(self.grid_identity)
        tokens = self.appearance(sampled) + self.place(place) + torch.cat(identity)
        counts = [x.shape[1] for x in (*landmarks, grid)]
        *own, of_grid = tokens.split(counts, dim=1)
        searches, suggested = [None] * len(own), [None] * len(own)
        for i, (name, branch) in enumerate(self.branches.items()):
            if branch.search is not None:
                searches[i] = branch.search(heatmaps[name], self.stride, image, landmarks[i], size)
                guidance, suggested[i] = branch.guide(searches[i])
                own[i] = own[i] + guidance
        tokens = self.norm(self.layers(torch.cat([*own, of_grid], dim=1)))
        *own, of_grid = tokens.split(counts, dim=1)
        polished = []
        for i, branch in enumerate(self.branches.values()):
            moves = branch.moves(own[i], suggested[i])
            moved = landmarks[i] + DISPLACEMENT_UNIT * size * moves.to(size)
            summary = torch.cat([own[i], of_grid], dim=1).mean(dim=1)
            polished.append(Polished(moved, branch.quality(summary), searches[i], summary))
        return polished


class Polish(nn.Module):
    """The third stage: step after step on the features of the backbone.

    Attributes:
        steps: from one to the next.
        outlines: of the branches that have any, what they teach the finest features.
        heatmaps: of those whose landmarks are sought, what makes the maps for it.
        towers: what the finest features go through before, for these maps alone.
        masks: of the branches whose landmarks are traced along masks in the end, what makes these
            from the finest features and from what the last step says.
    """

    def __init__(
        self,
        in_features: Sequence[str],
        strides: Sequence[int],
        steps: Sequence[PolishStep],
        convs: nn.Module | None = None,
        outlines: Mapping[str, OutlineMaps] | None = None,
        heatmaps: Mapping[str, nn.Module] | None = None,
        towers: Mapping[str, nn.Module] | None = None,
        masks: Mapping[str, MaskHead] | None = None,
    ) -> None:
        """
        Args:
            in_features: names of the feature maps that are looked at, finest first.
            strides: of these.
            convs: what the finest goes through before, if anything.
            steps, outlines, heatmaps, towers, masks: see the class; each of the heat maps has a
                tower.
        """
        super().__init__()
        self.in_features, self.strides = list(in_features), list(strides)
        self.steps = nn.ModuleList(steps)
        self.convs = nn.Sequential() if convs is None else convs
        self.outlines = nn.ModuleDict(outlines or {})
        self.heatmaps = nn.ModuleDict(heatmaps or {})
        self.towers = nn.ModuleDict(towers or {})
        self.masks = nn.ModuleDict(masks or {})

    def features(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """The maps to look at, each (B, C, H, W), from those of the backbone."""
        finest, *others = (features[name] for name in self.in_features)
        return [self.convs(finest), *others]

    def forward(
        self,
        features: list[Tensor],
        image: Tensor,
        landmarks: Sequence[Tensor],
        *,
        repeats: int = 0,
    ) -> list[list[Polished]]:
        """
        Args:
            features: of :meth:`features`.
            image, landmarks: see :meth:`PolishStep.forward`.
            repeats: how many times more the last step is made.

        Returns:
            What each step makes of those of each branch. No gradient flows from a step to those
            before.
        """
        heatmaps = {
            name: maps(self.towers[name](features[0])) for name, maps in self.heatmaps.items()
        }
        sampler = PointSampler(features, self.strides)
        results = []
        for step in [*self.steps, *repeats * [self.steps[-1]]]:
            results.append(step(sampler, image, landmarks, heatmaps))
            landmarks = [polished.landmarks.detach() for polished in results[-1]]
        return results

    def drawing(
        self,
        branch: str,
        features: list[Tensor],
        image: Tensor,
        boxes: Tensor,
        polished: Polished,
    ) -> Callable[[Tensor | slice], LatticeMasks] | None:
        """What makes the masks of some of N points, given their indices; None: there are none.

        Args:
            branch: its name.
            features: of :meth:`features`.
            image: (N,), in which image the points are.
            boxes: (N, 4) XYXY, of the objects.
            polished: what the last step made of the branch's landmarks.
        """
        if branch not in self.masks:
            return None

        def draw(at: Tensor | slice) -> LatticeMasks:
            return self.masks[branch](
                features[0], image[at], boxes[at], polished.summary[at], polished.landmarks[at]
            )

        return draw


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
        ValueError: the backbone has no such feature, or a number is out of its range; the message
            names the key.
    """
    node = cfg.MODEL.LSNET
    names = list(node.POLISH_IN_FEATURES)
    if not names:
        return None
    if set(names) - set(shapes):
        raise ValueError(
            f"MODEL.LSNET.POLISH_IN_FEATURES is {names}; the backbone has {', '.join(shapes)}"
        )
    strides = [shapes[name].stride for name in names]
    if strides != sorted(strides):
        raise ValueError(f"MODEL.LSNET.POLISH_IN_FEATURES is {names}; the finest must come first")
    if node.POLISH_STEPS < 1:
        raise ValueError(f"MODEL.LSNET.POLISH_STEPS is {node.POLISH_STEPS}; it must be positive")
    for key in ("POLISH_GRID", "POLISH_REPEATS_TEST", "KEYPOINT_SEARCH_CONVS"):
        if node[key] < 0:
            raise ValueError(f"MODEL.LSNET.{key} is {node[key]}; it must not be negative")
    if not 0 <= node.QUALITY_SHARE_TEST <= 1:
        raise ValueError(
            f"MODEL.LSNET.QUALITY_SHARE_TEST is {node.QUALITY_SHARE_TEST}; it must be from 0 to 1"
        )
    finest = shapes[names[0]]
    if len({shapes[name].channels for name in names}) > 1:
        raise ValueError(
            f"MODEL.LSNET.POLISH_IN_FEATURES is {names}; all must have as many channels as "
            f"{names[0]}, {finest.channels}"
        )
    outlined = [b for b in branches if b.outlined and node.OUTLINE_MAPS]
    traced = [b for b in branches if b.traced_points]
    searchable = [b for b in branches if b.searchable and node.KEYPOINT_SEARCH]
    steps = [
        PolishStep(
            {branch.name: branch.num_landmarks for branch in branches},
            sum(shapes[name].channels for name in names),
            node.NUM_CLASSES,
            stride=finest.stride,
            grid=node.POLISH_GRID,
            reach={branch.name: _REACH / 2**number for branch in searchable},
        )
        for number in range(node.POLISH_STEPS)
    ]
    convs = plain_convs(finest.channels, _NUM_CONVS if outlined or searchable or traced else 0)
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
    towers = {b.name: plain_convs(finest.channels, node.KEYPOINT_SEARCH_CONVS) for b in searchable}
    masks = {
        branch.name: MaskHead(finest.channels, _CHANNELS, stride=finest.stride) for branch in traced
    }
    return Polish(names, strides, steps, convs, outlines, heatmaps, towers, masks)

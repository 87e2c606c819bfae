"""Where the keypoints are, of every cell near one.

Each kind of keypoint has a map of where there are any (as in CenterNet, arXiv 1904.07850), and one
of the way to the nearest (as in PersonLab, arXiv 1803.08225). They do not know objects: the third
stage, which does, reads them where it takes a keypoint to be.

Letters as in :mod:`.maps`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .blocks import same_conv, set_prior
from .landmarks import LandmarkTargets
from .losses import gaussian_focal_loss
from .maps import LandmarkMaps, at_least_one, mean_of

# Deviation of the heat around a keypoint, in cells.
_HEAT = 1.0
# How far from a keypoint cells tell the way: a share of the object's size, at least so many cells.
_REACH, _LEAST_REACH = 0.15, 2.0
_HEAT_BEFORE_TRAINING = 0.02


class KeypointMaps(LandmarkMaps):
    key = "KEYPOINT_MAPS"
    loss_names = ("loss_heat", "loss_way")
    guides = True

    def __init__(
        self, *, channels: int, num_keypoints: int, stride: int, loss_weights: Sequence[float]
    ) -> None:
        """
        Args:
            channels: C.
            num_keypoints: V.
            stride, loss_weights: see :class:`LandmarkMaps`; of where keypoints are, and of the way
                to them.
        """
        super().__init__(stride, loss_weights)
        self.num_keypoints = num_keypoints
        self.heat = same_conv(channels, num_keypoints, 1)
        self.displacement = same_conv(channels, 2 * num_keypoints, 1)
        set_prior(self.heat, _HEAT_BEFORE_TRAINING)

    def forward(self, feature: Tensor) -> Tensor:
        heat = self.heat(feature).unsqueeze(2)
        displacement = self.displacement(feature).unflatten(1, (self.num_keypoints, 2))
        return torch.cat([heat, displacement], dim=2).flatten(1, 2)

    def errors(
        self,
        feature: Tensor,
        targets: list[LandmarkTargets],
        classes: list[Tensor],
        known: Tensor,
    ) -> tuple[Tensor, ...]:
        maps = self(feature).unflatten(1, (self.num_keypoints, 3))
        heat, way = maps[:, :, 0], maps[:, :, 1:]
        true = [keypoints_around(t, known.shape[1:], self.stride) for t in targets]
        true_heat, true_way, reach = (torch.stack(parts) for parts in zip(*true, strict=True))
        known = known[:, None]
        found = (gaussian_focal_loss(heat, true_heat) * known).sum()
        away = (way - true_way).abs().sum(2) / reach.clamp(min=1)
        peaks = ((true_heat == 1) & known).sum()
        return found / at_least_one(peaks), mean_of(away, (reach > 0) & known)


def keypoints_around(
    targets: LandmarkTargets, size: tuple[int, int], stride: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What the maps of an image should be.

    Args:
        targets: of G objects.
        size: (H, W).

    Returns:
        heat (V, H, W) in [0, 1], 1 in the cells nearest to keypoints of the kind; the way to the
        nearest (V, 2, H, W) as x, y in cells; and its reach (V, H, W) in
        cells, 0 where none is within reach.
    """
    height, width = size
    places = targets.landmarks.float() / stride
    num_keypoints = places.shape[1]
    sizes = (targets.boxes[:, 2:] - targets.boxes[:, :2]).norm(dim=1) / stride
    reaches = (_REACH * sizes).clamp(min=_LEAST_REACH)
    x = torch.arange(width, dtype=places.dtype, device=places.device)
    y = torch.arange(height, dtype=places.dtype, device=places.device)[:, None]
    heat = places.new_zeros(num_keypoints, height, width)
    way = places.new_zeros(num_keypoints, 2, height, width)
    nearness = places.new_ones(num_keypoints, height, width)  # 1: at the end of the reach
    reach = torch.zeros_like(nearness)
    for landmarks, visible, own in zip(places, targets.visible, reaches, strict=True):
        right = (landmarks[:, 0, None, None] - x).expand_as(heat)
        down = (landmarks[:, 1, None, None] - y).expand_as(heat)
        distance = (right.square() + down.square()).masked_fill(~visible[:, None, None], torch.inf)
        # The cell that is nearest, if it is on the map, is hot.
        peak = (right.abs() <= 0.5) & (down.abs() <= 0.5) & visible[:, None, None]
        gaussian = (-distance / (2 * _HEAT**2)).exp()
        heat = torch.maximum(heat, torch.where(peak, torch.ones_like(heat), gaussian))
        relative = distance.sqrt() / own
        nearer = relative < nearness
        nearness = torch.where(nearer, relative, nearness)
        way = torch.where(nearer[:, None], torch.stack([right, down], dim=1), way)
        reach = torch.where(nearer, own, reach)
    return heat, way, reach

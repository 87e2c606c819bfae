"""Where the keypoints are, of every cell near one.

Each kind of keypoint has a map of where there are any (as in CenterNet, arXiv 1904.07850), and one
of the way to the nearest (as in PersonLab, arXiv 1803.08225). They do not know objects: the third
stage, which does, reads them where it takes a keypoint to be.

Letters as in :mod:`.maps`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .assigners import lowest_cost
from .blocks import same_conv, set_prior
from .landmarks import LandmarkTargets
from .losses import gaussian_focal_loss
from .maps import LandmarkMaps, at_least_one

# Deviation of the heat around a keypoint, and from where on there is none, in cells.
_HEAT, _COLD = 1.0, 4
# How far from a keypoint cells tell the way: a share of the object's size, within limits in cells.
_REACH = 0.15
_REACHES = 2.0, 8.0
_HEAT_BEFORE_TRAINING = 0.02


class KeypointMaps(LandmarkMaps):
    key = "KEYPOINT_MAPS"
    loss_names = ("loss_heat", "loss_way")
    per_landmark = True

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
        nn.init.zeros_(self.displacement.weight)

    def read(self, sampled: Tensor) -> tuple[Tensor, Tensor]:
        return self._read(self.heat, sampled), self._read(self.displacement, sampled)

    def _read(self, layer: nn.Conv2d, sampled: Tensor) -> Tensor:
        """(N, V, k): of each keypoint the k values that its own part of the layer gives."""
        weight = layer.weight.view(self.num_keypoints, -1, layer.in_channels)
        bias = layer.bias.view(self.num_keypoints, -1)
        return torch.einsum("nvc,vkc->nvk", sampled, weight) + bias

    def errors(
        self,
        feature: Tensor,
        targets: list[LandmarkTargets],
        classes: list[Tensor],
        known: Tensor,
    ) -> tuple[Tensor, ...]:
        heat = self.heat(feature).float()
        way = self.displacement(feature).float().unflatten(1, (self.num_keypoints, 2))
        true = [keypoints_around(target, known.shape[1:], self.stride) for target in targets]
        true_heat, true_way, reach = (torch.stack(parts) for parts in zip(*true, strict=True))
        known = known[:, None]
        found = (gaussian_focal_loss(heat, true_heat) * known).sum()
        near = (reach > 0) & known
        away = (way - true_way).permute(0, 1, 3, 4, 2)[near].abs().sum(1) / reach[near]
        peaks = ((true_heat == 1) & known).sum()
        return found / at_least_one(peaks), away.sum() / at_least_one(near.sum())


@torch.no_grad()
def keypoints_around(
    targets: LandmarkTargets, size: tuple[int, int], stride: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What the maps of an image should be.

    Args:
        targets: of G objects.
        size: (H, W).

    Returns:
        heat (V, H, W) in [0, 1], 1 in the cells nearest to keypoints of the kind; the way to the
        nearest (V, 2, H, W) as x, y in cells; and how far that one reaches (V, H, W) in cells, 0
        where none does.
    """
    height, width = size
    num_keypoints = targets.landmarks.shape[1]
    cells_of_kind = height * width
    sizes = (targets.boxes[:, 2:] - targets.boxes[:, :2]).norm(dim=1) / stride
    owner, kind = torch.nonzero(targets.visible, as_tuple=True)
    places = targets.landmarks[owner, kind].float() / stride  # (M, 2)
    reach = (_REACH * sizes).clamp(*_REACHES)[owner].to(places)
    # The cells around each keypoint, up to the end of its heat and reach.
    extent = int(max(_COLD, _REACHES[1]))
    window = torch.arange(-extent, extent + 1, device=places.device)
    window = torch.stack(torch.meshgrid(window, window, indexing="xy"), -1).view(-1, 2)
    cells = places.round().long()[:, None] + window
    number = torch.arange(len(places), device=places.device)[:, None].expand(cells.shape[:2])
    on_map = ((cells >= 0) & (cells < cells.new_tensor([width, height]))).all(2)
    cells, number, peak = cells[on_map], number[on_map], (window == 0).all(1).expand_as(on_map)
    index = kind[number] * cells_of_kind + cells[:, 1] * width + cells[:, 0]
    distance = (places[number] - cells).norm(dim=1)

    gaussian = (-distance.square() / (2 * _HEAT**2)).exp() * (distance < _COLD)
    gaussian = torch.where(peak[on_map], torch.ones_like(gaussian), gaussian)
    heat = places.new_zeros(num_keypoints * cells_of_kind)
    heat = heat.scatter_reduce(0, index, gaussian, "amax")

    relative = distance / reach[number]
    within = relative < 1
    nearest = lowest_cost(len(heat), index[within], number[within], relative[within])
    near = torch.nonzero(nearest >= 0).squeeze(1)
    place = near % cells_of_kind
    place = torch.stack([place % width, place // width], dim=1)
    way, reaches = places.new_zeros(len(heat), 2), torch.zeros_like(heat)
    way[near] = places[nearest[near]] - place
    reaches[near] = reach[nearest[near]]
    return (
        heat.view(num_keypoints, height, width),
        way.view(num_keypoints, height, width, 2).permute(0, 3, 1, 2),
        reaches.view(num_keypoints, height, width),
    )

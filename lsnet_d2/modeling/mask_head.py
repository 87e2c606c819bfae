"""Masks of objects by filters of their own, and the contours that are traced along them.

A vertex that is a pixel off takes much of a limb with it, and no vertex knows when a limb is
missing, or a slit has been filled. So where there are outlines, the third stage may look at every
place in the box, too. What its tokens say of an object makes three small layers for this object
alone (CondInst, arXiv 2003.05664): from features at the place, of the finest map, where it is in
the box, and how far inside the contour, to whether the object covers it. The outline of what is
covered is the final contour.

Letters: N objects, B images, C channels, (H, W) the size of the finest map, K rows and columns of a
lattice, P vertices.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.contours import resample_contour
from ..data.polygons import level_set
from ..layers import PointSampler
from .areas import Lattice, signed_areas
from .blocks import plain_convs

_COUNT = 28
# What a lattice covers, relative to the box that was found; the true one may be larger.
_EXTENT = 1.2
# Of the map that filters read, of what they make of it, and convolutions before it.
_CHANNELS = 32
_HIDDEN = 16
_NUM_CONVS = 2
# How much finer this map is than the one that it is made from.
_FINER = 2
# How far inside or outside the contour a place counts as being, in cells of the lattice.
_FARTHEST = 3.0
_FILTERS_STD = 0.02


@dataclass
class LatticeMasks:
    """Masks of N objects, each on a lattice of its own.

    Attributes:
        logits: (N, K * K), row by row, of places being covered.
        lattice: where they are.
    """

    logits: Tensor
    lattice: Lattice

    def __getitem__(self, index: Tensor) -> "LatticeMasks":
        return LatticeMasks(self.logits[index], self.lattice[index])

    @property
    def probabilities(self) -> Tensor:
        """(N, K, K), row by row."""
        count = self.lattice.count
        return self.logits.float().sigmoid().unflatten(1, (count, count))

    @staticmethod
    def none(like: Tensor) -> "LatticeMasks":
        """Masks of no objects."""
        nothing = like.new_zeros(0, 2)
        return LatticeMasks(like.new_zeros(0, _COUNT**2), Lattice(nothing, nothing, _COUNT))

    def iou(self, true: Tensor) -> Tensor:
        """(N,): with polygons (N, P, 2), whose parts beyond a lattice count too; 0 where nothing
        covers a place."""
        found, covered = self.logits > 0, self.lattice.covered(true)
        shared = (found & covered).sum(1)
        area = signed_areas(true).abs() / self.lattice.cell.prod(dim=1)
        union = found.sum(1) + torch.maximum(area, covered.sum(1)) - shared
        return shared / union.clamp(min=1)

    def loss(self, true: Tensor) -> Tensor:
        """(N,): cross-entropy, the mean over a lattice, and 1 minus the Dice coefficient (arXiv
        1606.04797) with polygons (N, P, 2)."""
        logits, covered = self.logits.float(), self.lattice.covered(true).float()
        cross_entropy = F.binary_cross_entropy_with_logits(logits, covered, reduction="none")
        probs = logits.sigmoid()
        # The 1 is for objects too small to cover a place.
        shared, both = (probs * covered).sum(1), probs.square().sum(1) + covered.sum(1)
        return cross_entropy.mean(1) + 1 - (2 * shared + 1) / (both + 1)

    def trace(self, num_points: int, contours: Tensor) -> Tensor:
        """The outlines of the masks, as :func:`~lsnet_d2.data.contours.resample_contour` makes them
        of their parts and holes.

        Args:
            num_points: P'.
            contours: (N, P, 2), taken where a mask covers nothing.

        Returns:
            (N, P', 2); NaN where neither is finite.
        """
        count = self.lattice.count
        lattice = self.lattice.first, self.lattice.cell
        logits, first, cell, vertices = (
            x.detach().cpu().double().numpy() for x in (self.logits, *lattice, contours)
        )
        traced = np.full((len(vertices), num_points, 2), np.nan)
        for number, contour in enumerate(vertices):
            parts, holes = (
                [first[number] + cell[number] * ring for ring in rings]
                for rings in level_set(logits[number].reshape(count, count))
            )
            parts = parts or [contour]
            if all(np.isfinite(part).all() for part in parts):
                traced[number] = resample_contour(parts, num_points, holes=holes)
        return torch.from_numpy(traced).to(contours)


class MaskHead(nn.Module):
    """Makes the masks of objects from the finest features and what is said of each object."""

    def __init__(self, in_channels: int, token_channels: int, *, stride: int) -> None:
        """
        Args:
            in_channels: C.
            token_channels: of what is said of an object.
            stride: of the finest features, even.
        """
        super().__init__()
        self.map_stride = stride // _FINER
        self.features = nn.Sequential(
            *plain_convs(in_channels, _NUM_CONVS),
            nn.Conv2d(in_channels, _CHANNELS * _FINER**2, 3, padding=1),
            nn.PixelShuffle(_FINER),
        )
        # x and y in the box, and how far inside the contour
        self.layers = [(_CHANNELS + 3, _HIDDEN), (_HIDDEN, _HIDDEN), (_HIDDEN, 1)]
        self.filters = nn.Linear(token_channels, sum((i + 1) * o for i, o in self.layers))
        # At first all objects have about the same, with the initialisation of ReLUs.
        nn.init.normal_(self.filters.weight, std=_FILTERS_STD)
        weights = [
            torch.cat([torch.randn(i * o) * (2 / i) ** 0.5, torch.zeros(o)]) for i, o in self.layers
        ]
        self.filters.bias.data = torch.cat(weights)

    def forward(
        self, features: Tensor, image: Tensor, boxes: Tensor, summary: Tensor, contours: Tensor
    ) -> LatticeMasks:
        """
        Args:
            features: (B, C, H, W), the finest of the third stage.
            image: (N,), in which image the objects are.
            boxes: (N, 4) XYXY, theirs.
            summary: (N, C'), what tokens say of them.
            contours: (N, P, 2), theirs; no gradient flows into them, nor into the boxes.
        """
        lattice = Lattice.over(boxes.detach().unflatten(1, (2, 2)), _COUNT, _EXTENT)
        places = lattice.places
        seen = PointSampler([self.features(features)], [self.map_stride])(image, places)
        low, high = lattice.boxes[:, None].chunk(2, dim=2)
        within = (places - low) / (high - low) - 0.5
        depth = lattice.depth(contours.detach()).clamp(-_FARTHEST, _FARTHEST) / _FARTHEST
        values = torch.cat([seen, within.to(seen), depth[..., None].to(seen)], dim=2)
        sizes = [size for i, o in self.layers for size in (i * o, o)]
        filters = self.filters(summary).split(sizes, dim=1)
        for number, (shape, weight, bias) in enumerate(
            zip(self.layers, filters[::2], filters[1::2], strict=True)
        ):
            values = values.relu() if number else values
            values = torch.baddbmm(bias[:, None], values, weight.unflatten(1, shape))
        return LatticeMasks(values.squeeze(2), lattice)

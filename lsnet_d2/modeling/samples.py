"""What losses are computed from: the truth of a batch, and the points that learn some of it.

Letters: B images, A anchor points of all levels together, G objects, V landmarks of a branch, N
points.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .landmarks import LandmarkBranch, LandmarkTargets


@dataclass
class GroundTruth:
    """What a batch has to teach.

    Attributes:
        targets: per branch and image.
        classes: per image (G,).
        valid: (B, A) bool, points on the image and on its own padding.
        ignored: (B, A) bool, points in regions that are neither object nor background.
        regions: per image (R, 4) XYXY, these regions.
    """

    targets: list[list[LandmarkTargets]]
    classes: list[Tensor]
    valid: Tensor
    ignored: Tensor
    regions: list[Tensor]


@dataclass
class Matches:
    """Anchor points and their objects, N of them.

    Attributes:
        image, point: (N,) where they are.
        object: (N,) which object is theirs, counted through all images; -1: none.
    """

    image: Tensor
    point: Tensor
    object: Tensor

    def __getitem__(self, index: Tensor) -> "Matches":
        return Matches(self.image[index], self.point[index], self.object[index])

    def __len__(self) -> int:
        return len(self.image)

    @staticmethod
    def cat(matches: "list[Matches]") -> "Matches":
        return Matches(*(torch.cat([getattr(m, f.name) for m in matches]) for f in fields(Matches)))


@dataclass
class BranchSamples:
    """What one branch predicts in one stage where it has something to learn, and what that is.

    Attributes:
        branch: whose landmarks they are.
        vectors: (N, V + 1, 4) in cells.
        positives: N points with objects from which the branch learns.
        targets: of the objects of all images.
        normalizer: scalar, what the loss is divided by.
    """

    branch: LandmarkBranch
    vectors: Tensor
    positives: Matches
    targets: LandmarkTargets
    normalizer: Tensor

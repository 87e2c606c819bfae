"""What losses are computed from: the truth of a batch, and the points that learn some of it.

Letters: B images, A anchor points of all levels together, G objects, V landmarks of a branch, N
points.
"""

from dataclasses import dataclass, fields

import torch
from detectron2.utils import comm
from torch import Tensor

from .distributed import mean_over_workers
from .landmarks import LandmarkBranch, LandmarkTargets, as_indices


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
        index = as_indices(index)
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
    """

    branch: LandmarkBranch
    vectors: Tensor
    positives: Matches
    targets: LandmarkTargets


@dataclass
class StageSamples:
    """What the branches learn in one stage.

    Attributes:
        assigned: (B, A), the object of each point, counted in its image, or -1.
        branches: of each branch.
        divisors: (1 + branches,), see :func:`normalizers`.
    """

    assigned: Tensor
    branches: list[BranchSamples]
    divisors: Tensor


def normalizers(positives: Matches, targets: list[LandmarkTargets], num_images: int) -> Tensor:
    """What losses are divided by, averaged over workers.

    Args:
        positives: whatever the branches learn from their objects.
        targets: of each branch.

    Returns:
        (1 + branches,): for what all points have, classes say, the number of positives, at least
        one an image; for each branch that number without the positives from which it learns
        nothing.
    """
    per_image = positives.image.new_zeros(num_images)
    per_image = per_image.index_add(0, positives.image, torch.ones_like(positives.image))
    total = per_image.clamp(min=1).sum()
    without = [(~target.present[positives.object]).sum() for target in targets]
    totals = torch.stack([total, *(total - n for n in without)]).float()
    return mean_over_workers(totals).clamp(min=1 / comm.get_world_size())

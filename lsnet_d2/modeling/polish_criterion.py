"""What the third stage learns: where landmarks belong, and of what quality they are.

Letters: B images, A anchor points of all levels together, K classes, V landmarks of a branch, N
points.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor

from .assigners import pairwise_iou_inverted
from .distributed import mean_over_workers
from .head import HeadOutput
from .landmarks import LandmarkBranch, LandmarkTargets
from .outlines import known_cells
from .points import AnchorPoints
from .polish import Polish
from .samples import BranchSamples, GroundTruth, Matches


class PolishCriterion:
    """The losses of the third stage.

    Landmarks are learned on positives of the refine stage. Quality is also learned on *decoys*, the
    background that looks most like objects: on positives alone nothing would tell what is none.
    """

    @configurable
    def __init__(
        self,
        *,
        positives: int = 0,
        decoys: int = 0,
        quality_loss_weight: float = 0.25,
        search_loss_weight: float = 0.25,
    ) -> None:
        """
        Args:
            positives: anchor points of each object, chosen at random; 0: all of the refine stage.
            decoys: of each image, at most.
            quality_loss_weight, search_loss_weight: beside the branches' own weights, of their
                landmarks.

        Raises:
            ValueError: a number is negative; the message names the config's key.
        """
        for key, number in (("POSITIVES", positives), ("DECOYS", decoys)):
            if number < 0:
                raise ValueError(f"MODEL.LSNET.POLISH_{key} is {number}; it must not be negative")
        self.positives = positives
        self.decoys = decoys
        self.quality_loss_weight = quality_loss_weight
        self.search_loss_weight = search_loss_weight

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return {
            "positives": cfg.MODEL.LSNET.POLISH_POSITIVES,
            "decoys": cfg.MODEL.LSNET.POLISH_DECOYS,
            "quality_loss_weight": cfg.MODEL.LSNET.QUALITY_LOSS_WEIGHT,
            "search_loss_weight": cfg.MODEL.LSNET.KEYPOINT_SEARCH_LOSS_WEIGHT,
        }

    def __call__(
        self,
        points: AnchorPoints,
        predictions: HeadOutput,
        samples: list[BranchSamples],
        background: Tensor,
        truth: GroundTruth,
        polish: Polish,
        fine: list[Tensor],
    ) -> dict[str, Tensor]:
        """Losses by name, each a scalar with its weight.

        Args:
            samples: of each branch, in the refine stage, from whose landmarks the third goes on.
            background: (B, A) bool, points that are no object's and in no region that is ignored.
            polish: the third stage.
            fine: the feature maps that it looks at.
        """
        decoys = self.find_decoys(points, predictions, samples[0], background, truth)
        classes = torch.cat(truth.classes)
        losses = {}
        for found, dense in zip(samples, predictions.refine, strict=True):
            if self.positives:
                found = few_samples(found, self.positives, len(background))
            known = decoys[_teaching(decoys, found.targets)]
            vectors = dense[known.image, known.point].to(found.vectors)
            losses |= self.branch_losses(points, found, known, vectors, classes, polish, fine)
        return losses

    @staticmethod
    def map_losses(
        branches: list[LandmarkBranch],
        truth: GroundTruth,
        image_sizes: list[tuple[int, int]],
        polish: Polish,
        feature: Tensor,
    ) -> dict[str, Tensor]:
        """Losses of the maps by name, each a scalar with its weight.

        Args:
            image_sizes: (height, width) of each image.
            feature: (B, C, H, W), the finest features of the third stage.
        """
        losses = {}
        boxes = [target.boxes for target in truth.targets[0]]
        for branch, targets in zip(branches, truth.targets, strict=True):
            if branch.name not in polish.outlines:
                continue
            maps = polish.outlines[branch.name]
            # What lies in the boxes of objects without outlines is no background.
            ignored = [
                torch.cat([regions, own[~target.present]])
                for regions, own, target in zip(truth.regions, boxes, targets, strict=True)
            ]
            losses |= maps.losses(
                feature,
                [target[target.present] for target in targets],
                [c[t.present] for c, t in zip(truth.classes, targets, strict=True)],
                known_cells(tuple(feature.shape[-2:]), maps.stride, image_sizes, ignored),
            )
        return losses

    @torch.no_grad()
    def find_decoys(
        self,
        points: AnchorPoints,
        predictions: HeadOutput,
        first: BranchSamples,
        background: Tensor,
        truth: GroundTruth,
    ) -> Matches:
        """The background points of the highest scores, with the objects that they are taken for.

        That is the object whose box overlaps most with the one predicted there, if any does.

        Args:
            first: of the first branch, which supplies the boxes.
        """
        scores = predictions.logits.amax(dim=2).masked_fill(~background, -torch.inf)
        scores, chosen = scores.topk(min(self.decoys, scores.shape[1]), dim=1)
        image, column = torch.nonzero(scores.isfinite(), as_tuple=True)
        point = chosen[image, column]
        branch = first.branch
        vectors = predictions.refine[0][image, point].float()
        boxes = branch.boxes(branch.decode(vectors, points.xy[point], points.strides[point]))
        owner = torch.full_like(point, -1)
        start = 0
        for number, target in enumerate(truth.targets[0]):
            if len(target.boxes):
                own = image == number
                overlap = pairwise_iou_inverted(boxes[own, None], target.boxes)
                overlap, nearest = overlap.max(dim=1)
                owner[own] = torch.where(overlap > 0, nearest + start, -1)
            start += len(target.boxes)
        return Matches(image, point, owner)

    def branch_losses(
        self,
        points: AnchorPoints,
        samples: BranchSamples,
        decoys: Matches,
        decoy_vectors: Tensor,
        classes: Tensor,
        polish: Polish,
        fine: list[Tensor],
    ) -> dict[str, Tensor]:
        """Losses of a branch: means over the steps of the third stage.

        Each step takes the landmarks of the refine stage, or of the step before, without their
        gradient. What it says of their quality is learned from what it makes of them.

        Args:
            decoys: M points.
            decoy_vectors: (M, V + 1, 4) in cells.
            classes: of the objects of all images.
        """
        branch, positives = samples.branch, samples.positives
        count = len(positives)
        image, point, owner = (
            torch.cat(pair)
            for pair in (
                (positives.image, decoys.image),
                (positives.point, decoys.point),
                (positives.object, decoys.object),
            )
        )
        landmarks = branch.decode(
            torch.cat([samples.vectors, decoy_vectors]).detach(),
            points.xy[point],
            points.strides[point],
        )
        targets = samples.targets[positives.object]
        owned = torch.nonzero(owner >= 0).squeeze(1)
        owner = owner[owned]
        displacement, judgement, searching = [], [], []
        for moved, logits, search in polish(branch.name, fine, image, landmarks):
            if search is not None:
                loss = search[:count].loss(targets.landmarks, targets.visible)
                searching.append(loss.sum())
            displacement.append(branch.displacement_loss(moved[:count], targets).sum())
            quality = torch.zeros_like(logits, dtype=torch.float32)
            reached = branch.quality(moved[owned].detach(), samples.targets[owner])
            quality[owned, classes[owner]] = reached.to(quality)
            judgement.append(
                F.binary_cross_entropy_with_logits(logits.float(), quality, reduction="sum")
            )
        return {
            f"loss_{branch.name}_{name}": weight * torch.stack(losses).mean() / samples.normalizer
            for name, weight, losses in (
                ("polish", branch.loss_weights["polish"], displacement),
                ("quality", self.quality_loss_weight, judgement),
                ("search", self.search_loss_weight, searching),
            )
            if losses
        }


def _teaching(matches: Matches, targets: LandmarkTargets) -> Tensor:
    """(N,) bool: matches with no object, or with one from which the branch learns."""
    teaching = matches.object < 0
    teaching[~teaching] = targets.present[matches.object[~teaching]]
    return teaching


def few_samples(samples: BranchSamples, count: int, num_images: int) -> BranchSamples:
    """At most ``count`` samples of each object, chosen at random.

    They are the new normalizer, at least one an image.
    """
    kept = few_of_each(samples.positives.object, count)
    positives = samples.positives[kept]
    per_image = torch.bincount(positives.image, minlength=num_images)
    return replace(
        samples,
        vectors=samples.vectors[kept],
        positives=positives,
        normalizer=mean_over_workers(per_image.clamp(min=1).sum().float()),
    )


def few_of_each(values: Tensor, count: int) -> Tensor:
    """Indices of at most ``count`` elements of each value in ``values`` (N,), chosen at random."""
    order = torch.randperm(len(values), device=values.device)
    order = order[values[order].argsort(stable=True)]
    ordered = values[order]
    rank = torch.arange(len(values), device=values.device) - torch.searchsorted(ordered, ordered)
    return order[rank < count]

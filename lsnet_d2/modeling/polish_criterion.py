"""What the third stage learns: where landmarks belong, and of what quality they are.

Letters: B images, A anchor points of all levels together, K classes, V landmarks of a branch, N
points.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor

from .assigners import pairwise_iou_inverted
from .head import HeadOutput
from .landmarks import LandmarkBranch, LandmarkTargets, as_indices
from .mask_head import LatticeMasks
from .outlines import known_cells
from .points import AnchorPoints
from .polish import Polish, Polished
from .samples import BranchSamples, GroundTruth, Matches, normalizers


class PolishCriterion:
    """The losses of the third stage.

    Landmarks are learned on positives of the refine stage. Quality is also learned on hard
    negatives, the background that looks most like objects: on positives alone nothing would tell
    what is none.
    """

    @configurable
    def __init__(
        self,
        *,
        positives: int = 0,
        negatives: int = 12,
        quality_loss_weight: float = 0.25,
        search_loss_weight: float = 0.25,
        mask_loss_weight: float = 2.0,
    ) -> None:
        """
        Args:
            positives: anchor points of each object, chosen at random; 0: all of the refine stage.
            negatives: of each image, at most.
            quality_loss_weight, search_loss_weight, mask_loss_weight: beside the branches' own
                weights, of their landmarks.

        Raises:
            ValueError: a number is negative; the message names the config's key.
        """
        for key, number in (
            ("POLISH_POSITIVES", positives),
            ("POLISH_NEGATIVES", negatives),
            ("MASK_LOSS_WEIGHT", mask_loss_weight),
        ):
            if not number >= 0:
                raise ValueError(f"MODEL.LSNET.{key} is {number}; it must not be negative")
        self.positives = positives
        self.negatives = negatives
        self.quality_loss_weight = quality_loss_weight
        self.search_loss_weight = search_loss_weight
        self.mask_loss_weight = mask_loss_weight

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return {
            "positives": cfg.MODEL.LSNET.POLISH_POSITIVES,
            "negatives": cfg.MODEL.LSNET.POLISH_NEGATIVES,
            "quality_loss_weight": cfg.MODEL.LSNET.QUALITY_LOSS_WEIGHT,
            "search_loss_weight": cfg.MODEL.LSNET.KEYPOINT_SEARCH_LOSS_WEIGHT,
            "mask_loss_weight": cfg.MODEL.LSNET.MASK_LOSS_WEIGHT,
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
            samples: of each branch, in the refine stage.
            background: (B, A) bool, points that are no object's and in no region that is ignored.
            polish: the third stage.
            fine: the feature maps that it looks at.
        """
        negatives = self.find_negatives(points, predictions, samples[0], background, truth)
        positives = samples[0].positives  # all have what the first branch learns
        if self.positives:
            positives = positives[few_of_each(positives.object, self.positives)]
        candidates = Matches.cat([positives, negatives])
        landmarks = [
            found.branch.decode(
                dense[candidates.image, candidates.point].detach().float(),
                points.xy[candidates.point],
                points.strides[candidates.point],
            )
            for found, dense in zip(samples, predictions.refine, strict=True)
        ]
        steps = polish(fine, candidates.image, landmarks)
        classes = torch.cat(truth.classes)
        targets = [found.targets for found in samples]
        of_quality, *of_landmarks = normalizers(positives, targets, len(background))
        boxes = samples[0].branch.boxes(steps[-1][0].landmarks)
        losses = {}
        for found, divisor, *polished in zip(samples, of_landmarks, *steps, strict=True):
            losses |= self.branch_losses(
                found.branch,
                polished,
                candidates.object,
                len(positives),
                found.targets,
                classes,
                divisor,
                of_quality,
                polish.drawing(found.branch.name, fine, candidates.image, boxes, polished[-1]),
            )
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
            present = [as_indices(target.present) for target in targets]
            losses |= maps.losses(
                feature,
                [target[index] for target, index in zip(targets, present, strict=True)],
                [own[index] for own, index in zip(truth.classes, present, strict=True)],
                known_cells(tuple(feature.shape[-2:]), maps.stride, image_sizes, ignored),
            )
        return losses

    @torch.no_grad()
    def find_negatives(
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
        scores, chosen = scores.topk(min(self.negatives, scores.shape[1]), dim=1)
        image, column = torch.nonzero(scores.isfinite(), as_tuple=True)
        point = chosen[image, column]
        branch = first.branch
        vectors = predictions.refine[0][image, point].float()
        boxes = branch.boxes(branch.decode(vectors, points.xy[point], points.strides[point]))
        objects = [target.boxes for target in truth.targets[0]]
        overlap = pairwise_iou_inverted(boxes[:, None], torch.cat(objects))
        numbers = torch.cat([image.new_full((len(o),), n) for n, o in enumerate(objects)])
        overlap = overlap.masked_fill(image[:, None] != numbers, 0)
        # The first of equals is taken: nothing, where nothing overlaps.
        return Matches(image, point, F.pad(overlap, (1, 0)).argmax(dim=1) - 1)

    def branch_losses(
        self,
        branch: LandmarkBranch,
        steps: Sequence[Polished],
        objects: Tensor,
        num_positives: int,
        targets: LandmarkTargets,
        classes: Tensor,
        normalizer: Tensor,
        quality_normalizer: Tensor,
        draw: Callable[[Tensor], LatticeMasks] | None = None,
    ) -> dict[str, Tensor]:
        """Losses of a branch: means over the steps of the third stage, and of masks that the last
        one leads to.

        What a step says of the quality of landmarks is learned from what it makes of them, the
        last one's from the masks, if there are any.

        Args:
            steps: what each makes of N candidates, positives and behind them negatives.
            objects: (N,), counted through all images; -1: none.
            num_positives: among the candidates.
            targets, classes: of the objects of all images.
            normalizer: scalar, what the losses of landmarks are divided by.
            quality_normalizer: what that of quality is divided by, for which negatives count too.
            draw: makes the masks of some of the candidates, if the branch has masks; all of its
                landmarks are visible then.
        """
        # Of a candidate without an object it is known that nothing is there, of one with an object
        # from which the branch learns, what.
        nothing = objects < 0
        owned = torch.nonzero(~nothing).squeeze(1)
        owned = owned[targets.present[objects[owned]]]
        learned = owned[owned < num_positives]
        taught = targets[objects[learned]]
        # Of landmarks whose places nobody knows it cannot be said how good they are.
        judged = owned[targets.visible[objects[owned]].any(dim=1)]
        owner = objects[judged]
        compared = targets[owner]
        known = torch.cat([judged, torch.nonzero(nothing).squeeze(1)])
        reached = [branch.quality(step.landmarks[judged].detach(), compared) for step in steps]
        masking = []
        if draw is not None:
            masks = draw(judged)
            reached[-1] = masks.iou(compared.landmarks)
            masking.append(masks[: len(learned)].loss(taught.landmarks).sum())
        displacement, judgement, searching = [], [], []
        for (moved, logits, search, _), iou in zip(steps, reached, strict=True):
            if search is not None:
                loss = search[learned].loss(taught.landmarks, taught.visible)
                searching.append(loss.sum())
            displacement.append(branch.displacement_loss(moved[learned], taught).sum())
            quality = torch.zeros_like(logits, dtype=torch.float32)
            quality[judged, classes[owner]] = iou.to(quality)
            judgement.append(
                F.binary_cross_entropy_with_logits(
                    logits[known].float(), quality[known], reduction="sum"
                )
            )
        return {
            f"loss_{branch.name}_{name}": weight * torch.stack(losses).mean() / divisor
            for name, weight, losses, divisor in (
                ("polish", branch.loss_weights["polish"], displacement, normalizer),
                ("quality", self.quality_loss_weight, judgement, quality_normalizer),
                ("search", self.search_loss_weight, searching, normalizer),
                ("mask", self.mask_loss_weight, masking, normalizer),
            )
            if losses
        }


def few_of_each(values: Tensor, count: int) -> Tensor:
    """Indices of at most ``count`` elements of each value in ``values`` (N,), chosen at random."""
    order = torch.randperm(len(values), device=values.device)
    order = order[values[order].argsort(stable=True)]
    ordered = values[order]
    rank = torch.arange(len(values), device=values.device) - torch.searchsorted(ordered, ordered)
    return order[rank < count]

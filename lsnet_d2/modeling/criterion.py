"""What the anchor points learn: assignment, normalizers, and the losses of a batch.

Letters: B images, A anchor points of all levels together, G objects, K classes, V landmarks of a
branch, N positives.
"""

from dataclasses import replace

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor

from .assigners import assign_atss, assign_nearest, has_inside, pairwise_iou_inverted
from .corner_verification import CornerCriterion
from .head import HeadOutput
from .landmarks import LandmarkBranch, LandmarkTargets, as_indices
from .losses import quality_focal_loss
from .points import AnchorPoints, points_in_boxes
from .polish import Polish
from .polish_criterion import PolishCriterion
from .samples import BranchSamples, GroundTruth, Matches, StageSamples, normalizers

# The landmark losses are computed in units of this many cells (released code: point_base_scale).
_BASE_SCALE = 4


class Criterion:
    """The losses of a batch, from dense predictions and the objects of its images."""

    @configurable
    def __init__(
        self,
        *,
        branches: list[LandmarkBranch],
        strides: list[int],
        padding_divisor: int,
        num_classes: int,
        cls_loss_weight: float = 1.0,
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        init_positives: int = 1,
        atss_topk: int = 9,
        cls_soft_labels: bool = False,
        ignore_crowd: bool = True,
        corners: CornerCriterion | None = None,
        polish_criterion: PolishCriterion | None = None,
    ) -> None:
        """
        Args:
            branches: the first one supplies the boxes of assignment.
            strides: of the levels, finest first.
            padding_divisor: images alone are padded to a multiple of it.
            num_classes: K.
            init_positives: anchor points that each object takes in the init stage.
            atss_topk: candidates per level and object in the refine stage.
            cls_soft_labels: teach a class as much as the box at the point overlaps the object's.
            ignore_crowd: leave points inside ``ignore_boxes``, and inside objects without what the
                first branch learns, out of what is learned of the background.
            corners: the losses of corner verification, if there is any.
            polish_criterion: the losses of the third stage, if there is one.

        Raises:
            ValueError: a number is not positive; the message names the config's key.
        """
        for key, number in (("INIT_POSITIVES", init_positives), ("ATSS_TOPK", atss_topk)):
            if number < 1:
                raise ValueError(f"MODEL.LSNET.{key} is {number}; it must be positive")
        self.branches = branches
        self.strides = strides
        self.padding_divisor = max(padding_divisor, 1)
        self.num_classes = num_classes
        self.cls_loss_weight = cls_loss_weight
        self.focal_loss_alpha = focal_loss_alpha
        self.focal_loss_gamma = focal_loss_gamma
        self.init_positives = init_positives
        self.atss_topk = atss_topk
        self.cls_soft_labels = cls_soft_labels
        self.ignore_crowd = ignore_crowd
        self.corners = corners
        self.polish_criterion = polish_criterion

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        branches: list[LandmarkBranch],
        strides: list[int],
        padding_divisor: int,
    ) -> dict:
        return {
            "branches": branches,
            "strides": strides,
            "padding_divisor": padding_divisor,
            "num_classes": cfg.MODEL.LSNET.NUM_CLASSES,
            "cls_loss_weight": cfg.MODEL.LSNET.CLS_LOSS_WEIGHT,
            "focal_loss_alpha": cfg.MODEL.LSNET.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": cfg.MODEL.LSNET.FOCAL_LOSS_GAMMA,
            "init_positives": cfg.MODEL.LSNET.INIT_POSITIVES,
            "atss_topk": cfg.MODEL.LSNET.ATSS_TOPK,
            "cls_soft_labels": cfg.MODEL.LSNET.CLS_SOFT_LABELS,
            "ignore_crowd": cfg.MODEL.LSNET.IGNORE_CROWD,
            "corners": CornerCriterion(cfg) if cfg.MODEL.LSNET.CPV else None,
            "polish_criterion": PolishCriterion(cfg)
            if cfg.MODEL.LSNET.POLISH_IN_FEATURES
            else None,
        }

    def __call__(
        self,
        points: AnchorPoints,
        predictions: HeadOutput,
        image_sizes: list[tuple[int, int]],
        batched_inputs: list[dict],
        *,
        polish: Polish | None = None,
        fine: list[Tensor] = (),
    ) -> dict[str, Tensor]:
        """Losses by name, each a scalar with its weight.

        Args:
            image_sizes: (height, width) of each image.
            batched_inputs: with ``instances`` and, where there are any, ``ignore_boxes``.
            polish: the third stage; None: there is none.
            fine: the feature maps that the third stage looks at.
        """
        truth = self.ground_truth(points, image_sizes, batched_inputs)
        assigned = self.assign(points, predictions, truth.targets[0], truth.valid)
        targets = [LandmarkTargets.cat(t) for t in truth.targets]
        num_objects = [len(x) for x in truth.classes]
        init, refine = (
            self.samples(of_stage, num_objects, dense, targets)
            for of_stage, dense in zip(
                assigned, (predictions.init, predictions.refine), strict=True
            )
        )
        losses = {
            **self.landmark_losses(points, "init", init),
            **self.landmark_losses(points, "refine", refine),
        }
        # Classes and quality are learned where the refine stage has its objects.
        background = refine.assigned < 0
        if self.polish_criterion is not None:
            losses |= self.polish_criterion(
                points,
                predictions,
                refine.branches,
                background & truth.valid & ~truth.ignored,
                truth,
                polish,
                fine,
            )
            losses |= self.polish_criterion.map_losses(
                self.branches, truth, image_sizes, polish, fine[0]
            )
        if self.corners is not None:
            losses |= self.corners(
                points,
                predictions.corners,
                [target.boxes for target in truth.targets[0]],
                truth.classes,
                truth.valid,
                truth.ignored,
            )
        loss = self.classification_loss(
            predictions.logits,
            refine.branches[0].positives,  # all: the others take part in nothing
            torch.cat(truth.classes),
            truth.valid & ~(background & truth.ignored),
            self.overlaps(points, refine.branches[0]) if self.cls_soft_labels else None,
        )
        return {"loss_cls": self.cls_loss_weight * loss / refine.divisors[0], **losses}

    def ground_truth(
        self,
        points: AnchorPoints,
        image_sizes: list[tuple[int, int]],
        batched_inputs: list[dict],
    ) -> GroundTruth:
        """What the images' annotations say, for their objects and points."""
        instances = [inputs["instances"].to(points.xy.device) for inputs in batched_inputs]
        first = [self.branches[0].targets(x) for x in instances]
        regions = [
            self.ignored_regions(inputs, x.gt_boxes.tensor[~(t.present & has_inside(t.boxes))])
            for inputs, x, t in zip(batched_inputs, instances, first, strict=True)
        ]
        # Objects that the first branch cannot give a box take part in nothing.
        instances = [x[as_indices(t.present)] for x, t in zip(instances, first, strict=True)]
        return GroundTruth(
            targets=self.targets(instances),
            classes=[x.gt_classes for x in instances],
            valid=torch.stack([self.valid_points(points, size) for size in image_sizes]),
            ignored=torch.stack([points_in_boxes(points.xy, boxes) for boxes in regions]),
            regions=regions,
        )

    def targets(self, instances: list[Instances]) -> list[list[LandmarkTargets]]:
        """Of each branch and image. All aim at the centres of the first branch's boxes."""
        targets = [[branch.targets(x) for x in instances] for branch in self.branches]
        return [
            [replace(t, centers=first.centers) for t, first in zip(own, targets[0], strict=True)]
            for own in targets
        ]

    def ignored_regions(self, inputs: dict, unboxed: Tensor) -> Tensor:
        """(R, 4) XYXY: what is neither object nor background.

        These are the ``ignore_boxes``, and ``unboxed`` (N, 4), the annotations' boxes of objects
        of which the first branch learns nothing, or nothing in the refine stage.
        """
        if not self.ignore_crowd:
            return unboxed[:0]
        ignored = inputs.get("ignore_boxes")
        return unboxed if ignored is None else torch.cat([unboxed, ignored.to(unboxed)])

    def valid_points(self, points: AnchorPoints, image_size: tuple[int, int]) -> Tensor:
        """(A,) bool: points on the image and on its own padding, not on that of the batch."""
        padded = [-(-side // self.padding_divisor) * self.padding_divisor for side in image_size]
        # A level of stride s has ceil(side / s) rows or columns of the image, the last of which
        # begins before its end.
        height, width = padded
        return (points.xy[:, 0] < width) & (points.xy[:, 1] < height)

    @torch.no_grad()
    def assign(
        self,
        points: AnchorPoints,
        predictions: HeadOutput,
        targets: list[LandmarkTargets],
        valid: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Objects of the anchor points in the init and in the refine stage.

        Returns:
            Two tensors (B, A): index of the object within its image, or -1.
        """
        branch = self.branches[0]
        boxes = branch.boxes(branch.decode(predictions.init[0], points.xy, points.strides))
        per_level = points.per_level
        init, refine = [], []
        for image, target in enumerate(targets):
            init.append(
                assign_nearest(
                    points.xy,
                    self.strides,
                    per_level,
                    target.boxes,
                    valid=valid[image],
                    base_scale=_BASE_SCALE,
                    num_positives=self.init_positives,
                )
            )
            assignment, _ = assign_atss(
                boxes[image], per_level, target.boxes, valid=valid[image], topk=self.atss_topk
            )
            refine.append(assignment)
        return torch.stack(init), torch.stack(refine)

    def samples(
        self,
        assigned: Tensor,
        num_objects: list[int],
        dense: list[Tensor],
        targets: list[LandmarkTargets],
    ) -> StageSamples:
        """What the branches learn in one stage.

        Args:
            assigned, num_objects: see :meth:`positives`.
            dense: per branch (B, A, V + 1, 4), what the stage predicts.
            targets: of each branch, of the objects of all images.
        """
        positives = self.positives(assigned, num_objects)
        branches = []
        for branch, target, vectors in zip(self.branches, targets, dense, strict=True):
            learned = positives[target.present[positives.object]]
            found = vectors[learned.image, learned.point].float()
            branches.append(BranchSamples(branch, found, learned, target))
        return StageSamples(assigned, branches, normalizers(positives, targets, len(assigned)))

    @staticmethod
    def positives(assigned: Tensor, num_objects: list[int]) -> Matches:
        """
        Args:
            assigned: (B, A), objects counted in each image, or -1.
            num_objects: of each image.
        """
        image, point = torch.nonzero(assigned >= 0, as_tuple=True)
        counts = torch.tensor(num_objects, device=assigned.device)
        first = counts.cumsum(0) - counts
        return Matches(image, point, first[image] + assigned[image, point])

    @staticmethod
    @torch.no_grad()
    def overlaps(points: AnchorPoints, first: BranchSamples) -> Tensor:
        """(N,): IOU of the box predicted at each positive with that of its object.

        Args:
            first: of the first branch, which supplies the boxes.
        """
        branch, point = first.branch, first.positives.point
        boxes = branch.boxes(branch.decode(first.vectors, points.xy[point], points.strides[point]))
        true = first.targets.boxes[first.positives.object]
        return pairwise_iou_inverted(boxes, true).clamp(0, 1)  # rounding

    def classification_loss(
        self,
        logits: Tensor,
        positives: Matches,
        gt_classes: Tensor,
        counted: Tensor,
        overlaps: Tensor | None = None,
    ) -> Tensor:
        """Focal loss, summed over all counted points.

        Args:
            logits: (B, A, K).
            positives: N points with objects.
            gt_classes: (G,), of the objects of all images.
            counted: (B, A) bool.
            overlaps: (N,), what the scores of the positives' classes should be; None: 1.
        """
        logits = logits.float()
        target = torch.zeros_like(logits)
        classes = gt_classes[positives.object]
        score = torch.ones_like(classes, dtype=target.dtype) if overlaps is None else overlaps
        target[positives.image, positives.point, classes] = score
        if overlaps is not None:
            loss = quality_focal_loss(logits, target, gamma=self.focal_loss_gamma)
        else:
            loss = sigmoid_focal_loss(
                logits, target, alpha=self.focal_loss_alpha, gamma=self.focal_loss_gamma
            )
        return (loss * counted[..., None]).sum()

    def landmark_losses(
        self, points: AnchorPoints, stage: str, samples: StageSamples
    ) -> dict[str, Tensor]:
        """Losses of the branches in the init or in the refine stage, by name."""
        count = len(samples.branches[0].positives) / len(samples.assigned)
        get_event_storage().put_scalar(f"lsnet/num_pos_{stage}", count)
        return {
            f"loss_{found.branch.name}_{stage}": found.branch.loss_weights[stage]
            * self.landmark_loss(points, found)
            / divisor
            for found, divisor in zip(samples.branches, samples.divisors[1:], strict=True)
        }

    def landmark_loss(self, points: AnchorPoints, samples: BranchSamples) -> Tensor:
        """Loss of a branch, summed over its positives."""
        positives = samples.positives
        stride = points.strides[positives.point]
        loss = samples.branch.loss(
            samples.vectors * stride[:, None, None],
            samples.targets[positives.object],
            points.xy[positives.point],
            _BASE_SCALE * stride,
        )
        return loss.sum()

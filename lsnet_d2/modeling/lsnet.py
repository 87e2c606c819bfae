"""The LSNet meta-architecture (arXiv 2104.04899)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import ImageList, Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn

from .assigners import assign_atss, assign_nearest
from .head import HeadOutput, LSNetHead
from .landmarks import LandmarkBranch, LandmarkTargets, build_branches
from .points import AnchorPoints, make_anchor_points, points_in_boxes
from .polish import build_polish
from .postprocessing import make_instances, rescale_instances, select_detections, top_points
from .vectors import encode_vectors

__all__ = ["LSNet"]

# The landmark losses are computed in units of this many cells (released code: point_base_scale).
_BASE_SCALE = 4


@dataclass
class Positives:
    """Anchor points that learn an object, N of them.

    Attributes:
        image, point: (N,) where they are.
        object: (N,) what they learn, counted through all images.
    """

    image: Tensor
    point: Tensor
    object: Tensor

    def __getitem__(self, index: Tensor) -> "Positives":
        return Positives(self.image[index], self.point[index], self.object[index])

    def __len__(self) -> int:
        return len(self.image)


@META_ARCH_REGISTRY.register()
class LSNet(DenseDetector):
    """Anchor points with landmark vectors; which landmarks is the branches' business.

    Inputs and outputs are those of Detectron2's detectors. Training reads ``gt_boxes``,
    ``gt_classes`` and the branches' fields of ``instances``, and ``ignore_boxes`` of the input
    dict: regions that are neither object nor background. Inference returns ``pred_boxes``,
    ``scores``, ``pred_classes`` and the branches' fields.

    Letters: B images, A anchor points of all levels together, G objects, K classes, N positives.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: nn.Module,
        head: LSNetHead,
        head_in_features: list[str],
        branches: list[LandmarkBranch],
        num_classes: int,
        polish: nn.ModuleDict | None = None,
        polish_in_features: Sequence[str] = (),
        cls_loss_weight: float = 1.0,
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        init_positives: int = 1,
        atss_topk: int = 9,
        ignore_crowd: bool = True,
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.6,
        test_min_box_area: float = 0.0,
        max_detections_per_image: int = 100,
        pixel_mean: list[float],
        pixel_std: list[float],
        input_format: str = "RGB",
    ) -> None:
        """
        Args:
            backbone, head_in_features, pixel_mean, pixel_std: see :class:`DenseDetector`.
            head: predicts vectors for the same branches.
            branches: the first one supplies the boxes of assignment and NMS.
            polish: by name of the branch, what moves its landmarks in a third stage; None: nothing.
            polish_in_features: the backbone's features that it looks at.
            init_positives: anchor points that each object takes in the init stage.
            ignore_crowd: leave points inside ``ignore_boxes``, and inside objects without what the
                first branch learns, out of the classification loss.
            test_topk_candidates: points kept per level before NMS.
            test_min_box_area: in square pixels of the original image; detections need more.
            input_format: channel order of the images, for visualisation.
        """
        super().__init__(
            backbone, head, head_in_features, pixel_mean=pixel_mean, pixel_std=pixel_std
        )
        shapes = backbone.output_shape()
        self.strides = [shapes[name].stride for name in head_in_features]
        self.branches = branches
        self.num_classes = num_classes
        self.polish = polish
        self.polish_in_features = list(polish_in_features)
        self.cls_loss_weight = cls_loss_weight
        self.focal_loss_alpha = focal_loss_alpha
        self.focal_loss_gamma = focal_loss_gamma
        self.init_positives = init_positives
        self.atss_topk = atss_topk
        self.ignore_crowd = ignore_crowd
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.test_min_box_area = test_min_box_area
        self.max_detections_per_image = max_detections_per_image
        self.input_format = input_format

    @classmethod
    def from_config(cls, cfg) -> dict:
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        in_features = cfg.MODEL.LSNET.IN_FEATURES
        branches = build_branches(cfg)
        return {
            "backbone": backbone,
            "head": LSNetHead(cfg, [shapes[name] for name in in_features], branches),
            "head_in_features": in_features,
            "branches": branches,
            "num_classes": cfg.MODEL.LSNET.NUM_CLASSES,
            "polish": build_polish(cfg, shapes, branches),
            "polish_in_features": cfg.MODEL.LSNET.POLISH_IN_FEATURES,
            "cls_loss_weight": cfg.MODEL.LSNET.CLS_LOSS_WEIGHT,
            "focal_loss_alpha": cfg.MODEL.LSNET.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": cfg.MODEL.LSNET.FOCAL_LOSS_GAMMA,
            "init_positives": cfg.MODEL.LSNET.INIT_POSITIVES,
            "atss_topk": cfg.MODEL.LSNET.ATSS_TOPK,
            "ignore_crowd": cfg.MODEL.LSNET.IGNORE_CROWD,
            "test_score_thresh": cfg.MODEL.LSNET.SCORE_THRESH_TEST,
            "test_topk_candidates": cfg.MODEL.LSNET.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": cfg.MODEL.LSNET.NMS_THRESH_TEST,
            "test_min_box_area": cfg.MODEL.LSNET.MIN_BOX_AREA_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
        }

    def forward(self, batched_inputs: list[dict], *, do_postprocess: bool = True):
        """See :class:`DenseDetector`.

        Args:
            do_postprocess: whether detections are for the original images. Otherwise inference
                gives the ``Instances`` in pixels of the network's input.
        """
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        predictions = self.head([features[name] for name in self.head_in_features])
        points = make_anchor_points(predictions.sizes, self.strides, images.device)
        fine = [features[name] for name in self.polish_in_features]
        if self.training:
            return self.losses(points, predictions, fine, images.image_sizes, batched_inputs)
        results = self.inference(points, predictions, fine, images)
        if not do_postprocess:
            return results
        return [
            {
                "instances": rescale_instances(
                    result,
                    inputs.get("height", result.image_size[0]),
                    inputs.get("width", result.image_size[1]),
                    self.branches,
                    min_box_area=self.test_min_box_area,
                )
            }
            for inputs, result in zip(batched_inputs, results, strict=True)
        ]

    # ------------------------------------------------------------------ training

    def losses(
        self,
        points: AnchorPoints,
        predictions: HeadOutput,
        fine: list[Tensor],
        image_sizes: list[tuple[int, int]],
        batched_inputs: list[dict],
    ) -> dict[str, Tensor]:
        """Losses by name, each a scalar with its weight."""
        instances = [inputs["instances"].to(self.device) for inputs in batched_inputs]
        boxed = [self.branches[0].targets(x).present for x in instances]
        regions = [
            self.ignored_regions(inputs, x.gt_boxes.tensor[~present])
            for inputs, x, present in zip(batched_inputs, instances, boxed, strict=True)
        ]
        # Objects that the first branch cannot give a box take part in nothing.
        instances = [x[present] for x, present in zip(instances, boxed, strict=True)]
        targets = self.targets(instances)
        gt_classes = [x.gt_classes for x in instances]
        valid = torch.stack([self.valid_points(points, size) for size in image_sizes])
        ignored = torch.stack([points_in_boxes(points.xy, boxes) for boxes in regions])

        init, refine = self.assign(points, predictions, targets[0], valid)
        targets = [LandmarkTargets.cat(t) for t in targets]
        losses = {}
        for stage, assigned, dense in (
            ("init", init, predictions.init),
            ("refine", refine, predictions.refine),
        ):
            positives = self.positives(assigned, [len(x) for x in instances])
            normalizers = self.normalizers(positives, targets, len(instances))
            count = len(positives) / len(instances)
            get_event_storage().put_scalar(f"lsnet/num_pos_{stage}", count)
            found = []
            for i, branch in enumerate(self.branches):
                learned = positives[targets[i].present[positives.object]]
                vectors = dense[i][learned.image, learned.point].float()
                found.append((branch, vectors, learned, targets[i], normalizers[i + 1]))
                loss = self.landmark_loss(branch, points, vectors, learned, targets[i])
                weight = branch.loss_weights[stage]
                losses[f"loss_{branch.name}_{stage}"] = weight * loss / normalizers[i + 1]
        # The third stage goes on from what the refine stage found.
        for branch, vectors, learned, own, normalizer in found if self.polish else ():
            steps = self.polished(branch, points, vectors, learned, fine)
            steps = [
                self.landmark_loss(branch, points, x, learned, own) / normalizer for x in steps
            ]
            for number, loss in enumerate(steps, start=1):
                get_event_storage().put_scalar(
                    f"lsnet/{branch.name}_polish_{number}", loss.detach()
                )
            weight = branch.loss_weights["polish"]
            losses[f"loss_{branch.name}_polish"] = weight * torch.stack(steps).mean()
        # Classes are learned where the refine stage has its objects.
        counted = valid & ~((refine < 0) & ignored)
        loss = self.classification_loss(predictions.logits, refine, gt_classes, counted)
        return {"loss_cls": self.cls_loss_weight * loss / normalizers[0], **losses}

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
        of which the first branch learns nothing.
        """
        if not self.ignore_crowd:
            return unboxed[:0]
        ignored = inputs.get("ignore_boxes")
        return unboxed if ignored is None else torch.cat([unboxed, ignored.to(unboxed)])

    def valid_points(self, points: AnchorPoints, image_size: tuple[int, int]) -> Tensor:
        """(A,) bool: points on the image and on its own padding, not on that of the batch."""
        divisor = max(self.backbone.size_divisibility, 1)
        padded = [-(-side // divisor) * divisor for side in image_size]
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

    @staticmethod
    def positives(assigned: Tensor, num_objects: list[int]) -> Positives:
        """
        Args:
            assigned: (B, A), objects counted in each image, or -1.
            num_objects: of each image.
        """
        image, point = torch.nonzero(assigned >= 0, as_tuple=True)
        counts = torch.tensor(num_objects, device=assigned.device)
        first = counts.cumsum(0) - counts
        return Positives(image, point, first[image] + assigned[image, point])

    def normalizers(
        self, positives: Positives, targets: list[LandmarkTargets], num_images: int
    ) -> Tensor:
        """What the losses of a stage are divided by, averaged over workers.

        Returns:
            (1 + branches,): for the classes the number of positives, at least one an image; for
            each branch that number without the positives from which it learns nothing.
        """
        per_image = torch.bincount(positives.image, minlength=num_images)
        total = per_image.clamp(min=1).sum()
        without = [(~target.present[positives.object]).sum() for target in targets]
        totals = torch.stack([total, *(total - n for n in without)]).float()
        workers = comm.get_world_size()
        if workers > 1:
            dist.all_reduce(totals)
            totals /= workers
        return totals.clamp(min=1 / workers)

    def classification_loss(
        self, logits: Tensor, assigned: Tensor, gt_classes: list[Tensor], counted: Tensor
    ) -> Tensor:
        """Focal loss, summed over all counted points.

        Args:
            logits: (B, A, K).
            assigned: (B, A).
            gt_classes: per image (G,).
            counted: (B, A) bool.
        """
        labels = torch.full_like(assigned, self.num_classes)
        for image, classes in enumerate(gt_classes):
            positive = assigned[image] >= 0
            labels[image, positive] = classes[assigned[image, positive]]
        labels = F.one_hot(labels[counted], self.num_classes + 1)[:, :-1]
        return sigmoid_focal_loss(
            logits[counted].float(),
            labels.float(),
            alpha=self.focal_loss_alpha,
            gamma=self.focal_loss_gamma,
            reduction="sum",
        )

    def landmark_loss(
        self,
        branch: LandmarkBranch,
        points: AnchorPoints,
        vectors: Tensor,
        positives: Positives,
        targets: LandmarkTargets,
    ) -> Tensor:
        """Loss of a branch, summed over positive points.

        Args:
            vectors: (N, V + 1, 4) in cells, those of the points.
            targets: of the objects of all images.
        """
        stride = points.strides[positives.point]
        loss = branch.loss(
            vectors * stride[:, None, None],
            targets[positives.object],
            points.xy[positives.point],
            _BASE_SCALE * stride,
        )
        return loss.sum()

    def polished(
        self,
        branch: LandmarkBranch,
        points: AnchorPoints,
        vectors: Tensor,
        positives: Positives,
        fine: list[Tensor],
    ) -> list[Tensor]:
        """Vectors (N, V + 1, 4) of positive points after each step of the third stage, from those
        of the second, into which no gradient flows. That to the centre stays."""
        anchors, stride = points.xy[positives.point], points.strides[positives.point]
        vectors = vectors.detach()
        landmarks = branch.decode(vectors, anchors, stride)
        steps = []
        for moved in self.polish[branch.name](fine, positives.image, landmarks):
            moved = encode_vectors(moved - anchors[:, None], branch.alpha)
            steps.append(torch.cat([moved / stride[:, None, None], vectors[:, -1:]], dim=1))
        return steps

    # ------------------------------------------------------------------ inference

    def inference(
        self,
        points: AnchorPoints,
        predictions: HeadOutput,
        fine: list[Tensor],
        images: ImageList,
    ) -> list[Instances]:
        """Detections of each image, in pixels of the network's input."""
        scores = predictions.logits.float().sigmoid()
        return [
            self.inference_single_image(
                points,
                scores[image],
                [vectors[image].float() for vectors in predictions.refine],
                [feature[image : image + 1] for feature in fine],
                size,
            )
            for image, size in enumerate(images.image_sizes)
        ]

    def inference_single_image(
        self,
        points: AnchorPoints,
        scores: Tensor,
        vectors: list[Tensor],
        fine: list[Tensor],
        image_size: tuple[int, int],
    ) -> Instances:
        """
        Args:
            scores: (A, K).
            vectors: per branch (A, V + 1, 4) in cells.
            fine: each (1, C, H, W), the feature maps that the third stage looks at.
            image_size: (height, width).
        """
        kept = top_points(scores, points.per_level, self.test_topk_candidates)
        landmarks = [
            branch.decode(v[kept], points.xy[kept], points.strides[kept])
            for branch, v in zip(self.branches, vectors, strict=True)
        ]
        boxes = self.branches[0].boxes(landmarks[0])
        height, width = image_size
        boxes = torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height]))
        point, classes, scores = select_detections(
            boxes,
            scores[kept],
            score_thresh=self.test_score_thresh,
            nms_thresh=self.test_nms_thresh,
            max_detections=self.max_detections_per_image,
        )
        boxes, landmarks = boxes[point], [x[point] for x in landmarks]
        if self.polish is not None:
            image = torch.zeros_like(point)
            landmarks = [
                self.polish[branch.name](fine, image, x)[-1]
                for branch, x in zip(self.branches, landmarks, strict=True)
            ]
            boxes = self.branches[0].boxes(landmarks[0])
        return make_instances(image_size, boxes, scores, classes, self.branches, landmarks)

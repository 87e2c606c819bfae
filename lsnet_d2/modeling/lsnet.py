"""The LSNet meta-architecture (arXiv 2104.04899)."""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from .branches import build_branches
from .corner_verification import snap_boxes
from .criterion import Criterion
from .head import HeadOutput, LSNetHead
from .landmarks import LandmarkBranch
from .mask_head import LatticeMasks
from .points import AnchorPoints, make_anchor_points
from .polish import Polish, build_polish
from .postprocessing import (
    clip_boxes,
    make_instances,
    overlap_decay,
    rescale_instances,
    select_detections,
    top_points,
)

__all__ = ["LSNet"]


@META_ARCH_REGISTRY.register()
class LSNet(DenseDetector):
    """Anchor points with landmark vectors; which landmarks is the branches' business.

    Inputs and outputs are those of Detectron2's detectors. Training reads ``gt_boxes``,
    ``gt_classes`` and the branches' fields of ``instances``, and ``ignore_boxes`` of the input
    dict: regions that are neither object nor background. Inference returns ``pred_boxes``,
    ``scores``, ``pred_classes`` and the branches' fields.

    Letters: A anchor points of all levels together, K classes, V landmarks of a branch.

    Attributes:
        unused_features: see :func:`find_unused_features`.
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
        criterion: Criterion,
        polish: Polish | None = None,
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.6,
        test_min_box_area: float = 0.0,
        test_quality_share: float = 0.3,
        test_polish_repeats: int = 0,
        test_soft_nms_sigma: float = 0.0,
        max_detections_per_image: int = 100,
        pixel_mean: list[float],
        pixel_std: list[float],
    ) -> None:
        """
        Args:
            backbone, head_in_features, pixel_mean, pixel_std: see :class:`DenseDetector`.
            head: predicts vectors for the same branches.
            branches: the first one supplies the boxes of assignment and NMS.
            criterion: the losses, for the same branches.
            polish: the third stage, which moves landmarks; None: there is none.
            test_topk_candidates: points kept per level before NMS.
            test_min_box_area: in square pixels of the original image; detections need more.
            test_quality_share: of the third stage's judgement in scores, as an exponent.
            test_polish_repeats: how many times more the third stage makes its last step.
            test_soft_nms_sigma: of :func:`.overlap_decay`; 0: scores do not decay.

        Raises:
            ValueError: strides do not double from level to level, or the criterion has losses of a
                third stage that is not there, or none of one that is.
        """
        super().__init__(
            backbone, head, head_in_features, pixel_mean=pixel_mean, pixel_std=pixel_std
        )
        shapes = backbone.output_shape()
        self.strides = [shapes[name].stride for name in head_in_features]
        # Objects learn at the level that suits their size.
        if any(b != 2 * a for a, b in zip(self.strides, self.strides[1:], strict=False)):
            raise ValueError(
                f"MODEL.LSNET.IN_FEATURES have strides {self.strides}; each must be twice the one "
                "before"
            )
        if (polish is None) != (criterion.polish_criterion is None):
            raise ValueError("a third stage needs its losses in the criterion, and they need it")
        looked_at = {*head_in_features, *(polish.in_features if polish is not None else ())}
        self.unused_features = find_unused_features(backbone, looked_at)
        self.branches = branches
        self.num_classes = num_classes
        self.criterion = criterion
        self.polish = polish
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.test_min_box_area = test_min_box_area
        self.test_quality_share = test_quality_share
        self.test_polish_repeats = test_polish_repeats
        self.test_soft_nms_sigma = test_soft_nms_sigma
        self.max_detections_per_image = max_detections_per_image

    @classmethod
    def from_config(cls, cfg) -> dict:
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        in_features = cfg.MODEL.LSNET.IN_FEATURES
        if missing := [name for name in in_features if name not in shapes]:
            raise ValueError(
                f"MODEL.LSNET.IN_FEATURES names {missing}; the backbone has {', '.join(shapes)}"
            )
        branches = build_branches(cfg)
        return {
            "backbone": backbone,
            "head": LSNetHead(cfg, [shapes[name] for name in in_features], branches),
            "head_in_features": in_features,
            "branches": branches,
            "num_classes": cfg.MODEL.LSNET.NUM_CLASSES,
            "criterion": Criterion(
                cfg,
                branches,
                [shapes[name].stride for name in in_features],
                backbone.size_divisibility,
            ),
            "polish": build_polish(cfg, shapes, branches),
            "test_score_thresh": cfg.MODEL.LSNET.SCORE_THRESH_TEST,
            "test_topk_candidates": cfg.MODEL.LSNET.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": cfg.MODEL.LSNET.NMS_THRESH_TEST,
            "test_min_box_area": cfg.MODEL.LSNET.MIN_BOX_AREA_TEST,
            "test_quality_share": cfg.MODEL.LSNET.QUALITY_SHARE_TEST,
            "test_polish_repeats": cfg.MODEL.LSNET.POLISH_REPEATS_TEST,
            "test_soft_nms_sigma": cfg.MODEL.LSNET.SOFT_NMS_SIGMA_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def forward(self, batched_inputs: list[dict], *, do_postprocess: bool = True):
        """See :class:`DenseDetector`.

        Args:
            do_postprocess: whether detections are for the original images. Otherwise inference
                gives the ``Instances`` in pixels of the network's input.
        """
        images = self.preprocess_image(batched_inputs)
        points, predictions, fine = self.predict(images.tensor)
        if self.training:
            return self.criterion(
                points,
                predictions,
                images.image_sizes,
                batched_inputs,
                polish=self.polish,
                fine=fine,
            )
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

    def predict(self, images: Tensor) -> tuple[AnchorPoints, HeadOutput, list[Tensor]]:
        """
        Args:
            images: (B, 3, H, W), normalised and padded.

        Returns:
            The anchor points, what is predicted there, and the feature maps (B, C, H', W') that
            the third stage looks at.
        """
        features = self.backbone(images)
        predictions = self.head([features[name] for name in self.head_in_features])
        points = make_anchor_points(predictions.sizes, self.strides, images.device)
        fine = self.polish.features(features) if self.polish is not None else []
        return points, predictions, fine

    def inference(
        self,
        points: AnchorPoints,
        predictions: HeadOutput,
        fine: list[Tensor],
        images: ImageList,
    ) -> list[Instances]:
        """Detections of each image, in pixels of the network's input."""
        results = []
        for image, size in enumerate(images.image_sizes):
            *detections, landmarks, landmark_scores, masks = self.detect(
                points, predictions, fine, image, size
            )
            landmarks = [
                mask.trace(branch.traced_points, places) if mask is not None else places
                for branch, places, mask in zip(self.branches, landmarks, masks, strict=True)
            ]
            results.append(
                make_instances(size, *detections, self.branches, landmarks, landmark_scores)
            )
        return results

    def detect(
        self,
        points: AnchorPoints,
        predictions: HeadOutput,
        fine: list[Tensor],
        image: int,
        image_size: tuple[int, int],
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor], list[LatticeMasks | None]]:
        """Detections of one image, in pixels of the network's input. Boxes are clipped to the
        image, landmarks are not.

        Args:
            fine: each (B, C, H, W), the feature maps that the third stage looks at.
            image: its number in the batch.
            image_size: (height, width).

        Returns:
            Boxes (D, 4), scores (D,), classes (D,), and per branch landmarks (D, V, 2), their
            scores (D,), and the masks along which they are to be traced, if it has any; best first.
        """
        scores = predictions.logits[image].float().sigmoid()
        vectors = [vectors[image].float() for vectors in predictions.refine]
        kept = top_points(scores, points.per_level, self.test_topk_candidates)
        landmarks = [
            branch.decode(v[kept], points.xy[kept], points.strides[kept])
            for branch, v in zip(self.branches, vectors, strict=True)
        ]
        boxes = self.branches[0].boxes(landmarks[0])
        boxes = clip_boxes(boxes, image_size)
        if predictions.corners is not None:
            corners = predictions.corners[image]
            boxes = snap_boxes(boxes, points.levels[kept], points, corners)
            boxes = clip_boxes(boxes, image_size)
            landmarks[0] = self.branches[0].moved_to_boxes(landmarks[0], boxes)
        point, classes, scores = select_detections(
            boxes,
            scores[kept],
            score_thresh=self.test_score_thresh,
            nms_thresh=self.test_nms_thresh,
            max_detections=self.max_detections_per_image,
        )
        boxes, landmarks = boxes[point], [x[point] for x in landmarks]
        landmark_scores = [scores for _ in self.branches]
        masks = [LatticeMasks.none(boxes) if b.traced_points else None for b in self.branches]
        # On CUDA, attention of nothing is an error in torch 2.13 and 2.14.
        if self.polish is not None and (torch.compiler.is_exporting() or len(scores)):
            fine = [feature[image : image + 1] for feature in fine]
            landmarks, landmark_scores, masks = self.polished(fine, landmarks, scores, classes)
            boxes = clip_boxes(self.branches[0].boxes(landmarks[0]), image_size)
            # An object found twice is now found twice at the same place.
            kept, classes, scores = select_detections(
                boxes,
                F.one_hot(classes, self.num_classes) * landmark_scores[0][:, None],
                score_thresh=0.0,
                nms_thresh=self.test_nms_thresh,
                max_detections=self.max_detections_per_image,
            )
            boxes, landmarks = boxes[kept], [x[kept] for x in landmarks]
            landmark_scores = [x[kept] for x in landmark_scores]
            masks = [x and x[kept] for x in masks]
        if self.test_soft_nms_sigma:
            decay = overlap_decay(boxes, classes, self.test_soft_nms_sigma)
            scores, order = (scores * decay).sort(descending=True)
            boxes, classes = boxes[order], classes[order]
            landmarks = [x[order] for x in landmarks]
            landmark_scores = [(x * decay)[order] for x in landmark_scores]
            masks = [x and x[order] for x in masks]
        return boxes, scores, classes, landmarks, landmark_scores, masks

    def polished(
        self, fine: list[Tensor], landmarks: list[Tensor], scores: Tensor, classes: Tensor
    ) -> tuple[list[Tensor], list[Tensor], list[LatticeMasks | None]]:
        """What the third stage makes of the D detections of an image.

        Args:
            fine: each (1, C, H, W), the feature maps that it looks at.
            landmarks: per branch (D, V, 2).
            scores, classes: (D,).

        Returns:
            Per branch landmarks, (D,) their scores, and masks, if it has any.
        """
        image = torch.zeros_like(scores, dtype=torch.long)
        last = self.polish(fine, image, landmarks, repeats=self.test_polish_repeats)[-1]
        qualities = [
            polished.quality.float().sigmoid().gather(1, classes[:, None])[:, 0]
            for polished in last
        ]
        share = self.test_quality_share
        landmarks = [polished.landmarks for polished in last]
        boxes = self.branches[0].boxes(landmarks[0])
        drawings = [
            self.polish.drawing(branch.name, fine, image, boxes, polished)
            for branch, polished in zip(self.branches, last, strict=True)
        ]
        return (
            landmarks,
            [scores ** (1 - share) * quality**share for quality in qualities],
            [draw and draw(slice(None)) for draw in drawings],
        )


def find_unused_features(backbone: Backbone, looked_at: Collection[str]) -> list[str]:
    """Names of features that nothing looks at; weights that make nothing else get no gradients.

    They are those of the backbone, and what a network under its pyramid has beyond the coarsest one
    that the pyramid takes.

    Args:
        looked_at: features of the backbone.
    """
    unused = [name for name in backbone.output_shape() if name not in looked_at]
    if (bottom_up := getattr(backbone, "bottom_up", None)) is not None:
        shapes = bottom_up.output_shape()
        coarsest = max(shapes[name].stride for name in backbone.in_features)
        unused += [name for name, shape in shapes.items() if shape.stride > coarsest]
    return unused

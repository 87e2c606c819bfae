"""The kinds of landmark branches: extreme points of boxes, contours, and keypoints of poses.

Everything in which they differ is here. Letters as in :mod:`.landmarks`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from torch import Tensor

from ..data.contours import MAX_POINTS, MIN_POINTS
from ..data.keypoints import keypoint_flip_indices
from ..structures import ContourMasks
from ..tasks import branch_weights
from .areas import area_iou, following, signed_areas
from .assigners import pairwise_iou_inverted
from .landmarks import LandmarkBranch, LandmarkTargets, clip_points, span_boxes, spread_indices
from .losses import box_penalty, cross_iou, cross_iou_grouped, cross_iou_per_coordinate

# The cost of an error along the outline, relative to one across it: detections are judged by the
# latter, and where on a smooth outline a vertex lies is hard to see.
_SLIDING_COST = 0.25
# About the mean of COCO's tolerances of people's keypoints.
_OKS_SIGMA = 0.07
# About what COCO's people with keypoints cover of their boxes.
_COVERED = 0.5
# Least and most that the displacements of a contour are multiplied by in the third stage.
_SLENDERNESS = 1.0, 4.0
_TINY = 1e-6


class ExtremeBranch(LandmarkBranch):
    """Top, left, bottom and right extreme points. The box lies between them.

    Ground truth: ``gt_extreme_points`` (G, 4, 2) in this order, and ``gt_boxes``.
    """

    name = "bbox"
    pred_field = "pred_extreme_points"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(num_landmarks=4, sampling_landmarks=[0, 1, 2, 3], **kwargs)

    def targets(self, instances: Instances) -> LandmarkTargets:
        return LandmarkTargets.make(instances.gt_extreme_points, instances.gt_boxes.tensor)

    def boxes(self, landmarks: Tensor) -> Tensor:
        top, left, bottom, right = landmarks.unbind(-2)
        return torch.stack([left[..., 0], top[..., 1], right[..., 0], bottom[..., 1]], dim=-1)

    def moved_to_boxes(self, landmarks: Tensor, boxes: Tensor) -> Tensor:
        """Extreme points (..., 4, 2) put on the sides of boxes (..., 4), to which they then lead.

        Where on its side a point lies does not change, unless that is beyond the end of the side.
        """
        low, high = boxes[..., None, :2], boxes[..., None, 2:]
        x, y = torch.minimum(torch.maximum(landmarks, low), high).unbind(-1)
        x1, y1, x2, y2 = boxes.unbind(-1)
        x = torch.stack([x[..., 0], x1, x[..., 2], x2], dim=-1)
        y = torch.stack([y1, y[..., 1], y2, y[..., 3]], dim=-1)
        return torch.stack([x, y], dim=-1)

    def freedom(self, landmarks: Tensor) -> tuple[Tensor, Tensor]:
        """An extreme point may slide along its side of the box."""
        across = landmarks.new_tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(2, 1).expand_as(landmarks)
        return across, torch.full_like(landmarks[..., 0], _SLIDING_COST)

    def quality(self, landmarks: Tensor, targets: LandmarkTargets) -> Tensor:
        """IOU of the boxes."""
        # points that have changed sides make an inverted box; rounding, more than 1
        return pairwise_iou_inverted(self.boxes(landmarks), targets.boxes).clamp(0, 1)

    def flip_indices(self, dataset_names: Sequence[str]) -> list[int]:
        return [0, 3, 2, 1]

    def overlap_and_penalty(self, vectors, target_vectors, boxes, targets):
        overlap = cross_iou(vectors, target_vectors)
        return overlap, box_penalty(boxes, targets.boxes, overlap)


class ContourBranch(LandmarkBranch):
    """Vertices along the outline. The box is what they span.

    Ground truth: ``gt_contours`` (G, P, 2), vertices as
    :func:`lsnet_d2.data.contours.resample_contour` orders them; NaN for an object without a mask,
    from which the branch learns nothing.

    Besides ``pred_contours``, predictions have ``contour_scores`` (N,).
    """

    name = "segm"
    pred_field = "pred_contours"
    score_field = "contour_scores"
    outlined = True
    # With 36 vertices the released code samples at these; its checkpoints depend on it.
    _SAMPLING = {36: [0, 5, 10, 15, 20, 25, 30, 35]}
    _VERTICES_PER_GROUP = 4

    def __init__(
        self,
        *,
        num_points: int = 36,
        area_weight: float = 0.0,
        traced_points: int = 0,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            num_points: P, 8 to 128.
            area_weight: of the area beside the displacements, which the third stage loses.
            traced_points: of final contours, 8 to 128; 0: these have the landmarks.

        Raises:
            ValueError: a number is out of range; the message names the config's key.
        """
        counts = {"NUM_CONTOUR_POINTS": num_points, "TRACED_POINTS": traced_points or MIN_POINTS}
        for key, count in counts.items():
            if not MIN_POINTS <= count <= MAX_POINTS:
                raise ValueError(
                    f"MODEL.LSNET.{key} is {count}; it must be from {MIN_POINTS} to {MAX_POINTS}"
                )
        if not area_weight >= 0:
            raise ValueError(
                f"MODEL.LSNET.CONTOUR_AREA_LOSS_WEIGHT is {area_weight}; it must not be negative"
            )
        self.area_weight = area_weight
        self.traced_points = traced_points
        sampling = self._SAMPLING.get(num_points, spread_indices(num_points, 8))
        super().__init__(num_landmarks=num_points, sampling_landmarks=sampling, **kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.LSNET
        return {
            "num_points": node.NUM_CONTOUR_POINTS,
            "area_weight": node.CONTOUR_AREA_LOSS_WEIGHT,
            # without a third stage nothing makes masks
            "traced_points": node.TRACED_POINTS if node.POLISH_IN_FEATURES else 0,
        }

    def targets(self, instances: Instances) -> LandmarkTargets:
        contours = instances.gt_contours
        present = contours.isfinite().all(dim=2).all(dim=1)
        contours = torch.where(present[:, None, None], contours, torch.zeros_like(contours))
        return LandmarkTargets.make(contours, span_boxes(contours), present=present)

    def boxes(self, landmarks: Tensor) -> Tensor:
        return span_boxes(landmarks)

    def freedom(self, landmarks: Tensor) -> tuple[Tensor, Tensor]:
        """A vertex may slide along the outline, but the less the sharper its corner is."""
        edges = landmarks.roll(-1, 1) - landmarks
        chord = edges + edges.roll(1, 1)
        length, lengths = chord.norm(dim=-1), edges.norm(dim=-1)
        across = torch.stack([-chord[..., 1], chord[..., 0]], dim=-1)
        # At the tip of a spike without width no direction is one to slide in.
        across = torch.where(
            length[..., None] > _TINY,
            across / length.clamp(min=_TINY)[..., None],
            across.new_tensor([1.0, 0.0]),
        )
        straight = length / (lengths + lengths.roll(1, 1)).clamp(min=_TINY)
        return across, 1 - (1 - _SLIDING_COST) * straight

    def displacement_loss(self, landmarks: Tensor, targets: LandmarkTargets) -> Tensor:
        """Of thin objects the same displacements take more of the area, and cost more.

        Besides, if it has a weight, the area itself.
        """
        true = targets.landmarks
        loss = _slenderness(true) * super().displacement_loss(landmarks, targets)
        if self.area_weight:
            loss = loss + self.area_weight * targets.area.loss(landmarks)
        return loss

    def quality(self, landmarks: Tensor, targets: LandmarkTargets) -> Tensor:
        """The IOU of the areas."""
        return area_iou(landmarks, targets.landmarks)

    def flip_indices(self, dataset_names: Sequence[str]) -> list[int]:
        """The first vertex stays the first, and the direction is kept.

        Not so for vertices along several outlines, one of them a hole's: their order is another one
        in the mirrored image.
        """
        return [0, *range((self.traced_points or self.num_landmarks) - 1, 0, -1)]

    def overlap_and_penalty(self, vectors, target_vectors, boxes, targets):
        groups = self.num_landmarks // self._VERTICES_PER_GROUP
        overlap = cross_iou_grouped(vectors, target_vectors, groups)
        return overlap, box_penalty(boxes, targets.boxes, overlap)

    def rescale_predictions(self, instances: Instances, scale: tuple[float, float]) -> None:
        """Besides, enter the masks of the final contours, as ``pred_masks``."""
        super().rescale_predictions(instances, scale)
        contours = instances.get(self.pred_field)
        instances.pred_masks = ContourMasks(contours, instances.image_size)


class KeypointBranch(LandmarkBranch):
    """Keypoints of a pose. The box is what they span.

    Ground truth: ``gt_keypoints``, Detectron2's ``Keypoints`` (G, K, 3) with visibility 0 (not
    labelled), 1 (hidden) or 2; the latter two are learned alike. From an object without labelled
    keypoints the branch learns nothing, or where its centre is.

    ``pred_keypoints`` is (N, K, 3): x, y, and the score of the pose, which is in ``pose_scores``
    (N,) too; 0 for a detection of a class that has no keypoints.
    """

    name = "pose"
    pred_field = "pred_keypoints"
    score_field = "pose_scores"
    searchable = True
    # Of COCO's 17 the released code samples at the left ones; its checkpoints depend on it.
    _SAMPLING = {17: [1, 3, 5, 7, 9, 11, 13, 15]}

    def __init__(
        self,
        *,
        num_keypoints: int = 17,
        classes: Sequence[int] = (),
        train_unlabelled: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            num_keypoints: K, at least 1.
            classes: that have keypoints; none given: all. Those of others are not learned.
            train_unlabelled: whether an object of these classes without labelled keypoints trains
                the vector to its centre, as in the released code. It needs another branch to give
                its box.

        Raises:
            ValueError: K is 0; the message names the config's key.
        """
        if num_keypoints < 1:
            raise ValueError(f"MODEL.LSNET.NUM_KEYPOINTS is {num_keypoints}; it must be positive")
        sampling = self._SAMPLING.get(num_keypoints, spread_indices(num_keypoints, 8))
        super().__init__(num_landmarks=num_keypoints, sampling_landmarks=sampling, **kwargs)
        self.classes = list(classes)
        self.train_unlabelled = train_unlabelled

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {
            "num_keypoints": cfg.MODEL.LSNET.NUM_KEYPOINTS,
            "classes": cfg.MODEL.LSNET.KEYPOINT_CLASSES,
            "train_unlabelled": cfg.MODEL.LSNET.TRAIN_UNLABELLED_POSES,
        }

    def targets(self, instances: Instances) -> LandmarkTargets:
        keypoints = instances.gt_keypoints.tensor
        concerned = self._have_keypoints(instances.gt_classes)
        places, visible = keypoints[..., :2], (keypoints[..., 2] > 0) & concerned[:, None]
        low = places.masked_fill(~visible[..., None], torch.inf).amin(dim=1)
        high = places.masked_fill(~visible[..., None], -torch.inf).amax(dim=1)
        labelled = visible.any(dim=1)
        boxes = torch.cat([low, high], dim=1).masked_fill(~labelled[:, None], 0)
        present = labelled
        if self.train_unlabelled:
            present = present | concerned
        return LandmarkTargets.make(
            places,
            boxes,
            visible=visible,
            present=present,
            object_boxes=instances.gt_boxes.tensor,
        )

    def boxes(self, landmarks: Tensor) -> Tensor:
        return span_boxes(landmarks)

    def flip_indices(self, dataset_names: Sequence[str]) -> list[int]:
        """
        Raises:
            ConfigError: see :func:`lsnet_d2.data.keypoints.keypoint_flip_indices`.
        """
        return keypoint_flip_indices(dataset_names, self.num_landmarks)

    def overlap_and_penalty(self, vectors, target_vectors, boxes, targets):
        overlap = cross_iou_per_coordinate(vectors, target_vectors, targets.visible)
        return overlap, torch.zeros_like(overlap)

    def quality(self, landmarks: Tensor, targets: LandmarkTargets) -> Tensor:
        """Object keypoint similarity, with half of the object's box for its area and one tolerance
        for all keypoints."""
        sides = targets.object_boxes[:, 2:] - targets.object_boxes[:, :2]
        area = _COVERED * sides.prod(1).clamp(min=1)
        distance = (landmarks - targets.landmarks).square().sum(-1)
        similarity = (-distance / (2 * (2 * _OKS_SIGMA) ** 2 * area[:, None])).exp()
        visible = targets.visible.to(similarity)
        return (similarity * visible).sum(1) / visible.sum(1).clamp(min=1)

    def prediction(self, landmarks, scores, classes, image_size):
        scores = scores * self._have_keypoints(classes)
        column = scores[:, None, None].expand(-1, self.num_landmarks, 1)
        places = clip_points(landmarks, image_size)
        return torch.cat([places, column.to(places)], dim=2), scores

    def _have_keypoints(self, classes: Tensor) -> Tensor:
        """(N,) bool: which of the classes (N,) have keypoints."""
        if not self.classes:
            return torch.ones_like(classes, dtype=torch.bool)
        return (classes[:, None] == classes.new_tensor(self.classes)).any(dim=1)

    def rescale_predictions(self, instances: Instances, scale: tuple[float, float]) -> None:
        places = instances.get(self.pred_field)[..., :2]
        self.add_predictions(instances, places * places.new_tensor(scale), self.scores(instances))


def _slenderness(contours: Tensor) -> Tensor:
    """(N,): length of contours (N, P, 2) times their size over area, 1 for squares; limited."""
    length = (following(contours) - contours).norm(dim=-1).sum(1)
    size = (contours.amax(1) - contours.amin(1)).norm(dim=1)
    of_square = 4 * 2**0.5
    area = signed_areas(contours).abs().clamp(min=1)
    return (length * size / (of_square * area)).clamp(*_SLENDERNESS)


BRANCHES: dict[str, type[LandmarkBranch]] = {
    "extreme": ExtremeBranch,
    "contour": ContourBranch,
    "keypoint": KeypointBranch,
}


def build_branches(cfg: CfgNode) -> list[LandmarkBranch]:
    """The branches of MODEL.LSNET.TASK. The first supplies boxes, the last steers classification.

    Raises:
        ValueError: see :func:`lsnet_d2.tasks.branch_weights` and the branches.
    """
    weights = branch_weights(cfg)
    boxes_of_keypoints = next(iter(weights)) == "keypoint"
    if boxes_of_keypoints and cfg.MODEL.LSNET.NUM_KEYPOINTS == 1:
        raise ValueError(
            "MODEL.LSNET.NUM_KEYPOINTS is 1, but where the keypoints supply the boxes one alone "
            "spans none"
        )
    classes = cfg.MODEL.LSNET.NUM_CLASSES
    outside = [c for c in cfg.MODEL.LSNET.KEYPOINT_CLASSES if not 0 <= c < classes]
    if outside and "keypoint" in weights:
        raise ValueError(
            f"MODEL.LSNET.KEYPOINT_CLASSES names {outside}; classes are counted from 0, and "
            f"MODEL.LSNET.NUM_CLASSES is {classes}"
        )
    if cfg.MODEL.LSNET.TRACED_POINTS and "contour" in weights and boxes_of_keypoints:
        raise ValueError(
            "MODEL.LSNET.TRACED_POINTS is not 0, but where the keypoints supply the boxes a mask "
            "within one shows a part of the object"
        )
    if cfg.MODEL.LSNET.TRAIN_UNLABELLED_POSES and boxes_of_keypoints:
        raise ValueError(
            "MODEL.LSNET.TRAIN_UNLABELLED_POSES is True, but where the keypoints supply the boxes "
            "an object without keypoints has none"
        )
    if cfg.MODEL.LSNET.CLS_SOFT_LABELS and boxes_of_keypoints:
        raise ValueError(
            "MODEL.LSNET.CLS_SOFT_LABELS is True, but where the keypoints supply the boxes an "
            "object with unlabelled ones has a smaller box than a right prediction"
        )
    return [
        BRANCHES[name](
            alpha=cfg.MODEL.LSNET.CROSS_IOU_ALPHA,
            init_weight=init,
            refine_weight=refine,
            polish_weight=cfg.MODEL.LSNET.POLISH_LOSS_WEIGHT,
            **BRANCHES[name].from_config(cfg),
        )
        for name, (init, refine) in weights.items()
    ]

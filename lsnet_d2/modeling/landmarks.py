"""The landmark branch: what an object's landmarks are, and what follows from them.

A branch is a description without parameters of its own; the layers that predict its vectors are
the head's. Everything in which boxes with extreme points, contours and poses differ is here.

Letters: G objects, N positive points, V landmarks, ``...`` any leading dimensions. Coordinates are
x, y in pixels of the network's input image, unless said otherwise.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from torch import Tensor

from ..data.keypoints import keypoint_flip_indices
from ..structures import ContourMasks
from ..tasks import branch_weights
from .losses import box_penalty, cross_iou, cross_iou_grouped, cross_iou_per_coordinate
from .vectors import decode_vectors, encode_vectors

NUM_SAMPLING_POINTS = 9


@dataclass
class LandmarkTargets:
    """Ground truth of one branch.

    Attributes:
        landmarks: (G, V, 2).
        boxes: (G, 4) XYXY, the boxes that belong to the landmarks.
        centers: (G, 2), where the last vector points.
        visible: (G, V) bool, landmarks whose place is known.
        present: (G,) bool, objects that this branch learns from. What the others have for
            landmarks and boxes is finite, and without meaning.
    """

    landmarks: Tensor
    boxes: Tensor
    centers: Tensor
    visible: Tensor
    present: Tensor

    @staticmethod
    def make(
        landmarks: Tensor,
        boxes: Tensor,
        visible: Tensor | None = None,
        present: Tensor | None = None,
    ) -> "LandmarkTargets":
        """With the centres of the boxes; everything is visible and present if not given."""
        if visible is None:
            visible = torch.ones_like(landmarks[..., 0], dtype=torch.bool)
        if present is None:
            present = torch.ones_like(boxes[:, 0], dtype=torch.bool)
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        return LandmarkTargets(landmarks, boxes, centers, visible, present)

    def __getitem__(self, index: Tensor) -> "LandmarkTargets":
        return LandmarkTargets(*(getattr(self, f.name)[index] for f in fields(self)))

    @property
    def points(self) -> Tensor:
        """(G, V + 1, 2): the landmarks and, last, the centre."""
        return torch.cat([self.landmarks, self.centers[:, None]], dim=1)

    @staticmethod
    def cat(targets: list["LandmarkTargets"]) -> "LandmarkTargets":
        return LandmarkTargets(
            *(torch.cat([getattr(t, f.name) for t in targets]) for f in fields(LandmarkTargets))
        )


class LandmarkBranch(ABC):
    """One kind of landmarks.

    Attributes:
        name: names the losses, ``loss_{name}_init`` and ``loss_{name}_refine``.
        num_landmarks: V. The network predicts V + 1 vectors, the last to the centre of the box.
        sampling_landmarks: indices of the landmarks at which features are sampled. The centre is
            sampled too, and what is missing to nine points are free, learned displacements.
        pred_field: field of ``Instances`` that holds the predicted landmarks.
    """

    name: str
    pred_field: str

    def __init__(
        self,
        *,
        num_landmarks: int,
        sampling_landmarks: list[int],
        alpha: float = 0.2,
        init_weight: float = 1.0,
        refine_weight: float = 2.0,
        polish_weight: float = 2.0,
    ) -> None:
        """
        Args:
            num_landmarks, sampling_landmarks: see the class.
            alpha: see :func:`~lsnet_d2.modeling.vectors.encode_vectors`.
            init_weight, refine_weight, polish_weight: of the losses of the three stages.
        """
        self.num_landmarks = num_landmarks
        self.sampling_landmarks = sampling_landmarks
        self.alpha = alpha
        self.loss_weights = {
            "init": init_weight,
            "refine": refine_weight,
            "polish": polish_weight,
        }

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Arguments that this kind of branch has besides ``alpha`` and the weights."""
        return {}

    @property
    def num_vectors(self) -> int:
        return self.num_landmarks + 1

    @property
    def num_free_points(self) -> int:
        return NUM_SAMPLING_POINTS - 1 - len(self.sampling_landmarks)

    @abstractmethod
    def targets(self, instances: Instances) -> LandmarkTargets:
        """Ground truth of the objects of one image."""

    @abstractmethod
    def boxes(self, landmarks: Tensor) -> Tensor:
        """Boxes (..., 4) XYXY that landmarks (..., V, 2) span. They may be inverted."""

    @abstractmethod
    def flip_indices(self, dataset_names: Sequence[str]) -> list[int]:
        """Where each landmark comes from in the horizontally mirrored image.

        Args:
            dataset_names: registered data sets that know the model's keypoints.
        """

    @abstractmethod
    def overlap_and_penalty(
        self, vectors: Tensor, target_vectors: Tensor, boxes: Tensor, targets: LandmarkTargets
    ) -> tuple[Tensor, Tensor]:
        """Cross-IOU (N,) of the vectors (N, V + 1, 4), and what the loss adds to 1 minus it (N,).

        Args:
            vectors, target_vectors: in one unit of length for each point.
            boxes: (N, 4), spanned by the predicted landmarks, in the unit of ``targets``.
            targets: of the N points, in the unit of the vectors.
        """

    def sampling_points(self, vectors: Tensor, free_points: Tensor) -> Tensor:
        """Where features are sampled, relative to the anchor point.

        Args:
            vectors: (..., V + 1, 4).
            free_points: (..., num_free_points, 2) as x, y.

        Returns:
            (..., 9, 2) as x, y: chosen landmarks, centre, free points; in the unit of the inputs.
        """
        chosen = [*self.sampling_landmarks, self.num_landmarks]
        return torch.cat([decode_vectors(vectors[..., chosen, :]), free_points], dim=-2)

    def decode(self, vectors: Tensor, anchors: Tensor, strides: Tensor) -> Tensor:
        """Predicted landmarks.

        Args:
            vectors: (..., V + 1, 4) in cells.
            anchors: (..., 2), the anchor points.
            strides: (...), the size of a cell.

        Returns:
            (..., V, 2).
        """
        displacements = decode_vectors(vectors[..., :-1, :])
        return anchors[..., None, :] + strides[..., None, None] * displacements

    def loss(
        self, vectors: Tensor, targets: LandmarkTargets, anchors: Tensor, unit: Tensor
    ) -> Tensor:
        """Loss of each positive point.

        Args:
            vectors: (N, V + 1, 4) in pixels.
            targets: the object of each point.
            anchors: (N, 2).
            unit: (N,), the length in pixels that is 1 to the loss. It matters only next to the
                small constants that keep divisions defined.

        Returns:
            (N,).
        """
        unit = unit[:, None]
        origin = anchors / unit
        vectors = vectors / unit[..., None]
        targets = replace(
            targets,
            landmarks=targets.landmarks / unit[..., None],
            boxes=targets.boxes / unit,
            centers=targets.centers / unit,
        )
        target_vectors = encode_vectors(targets.points - origin[:, None], self.alpha)
        boxes = self.boxes(decode_vectors(vectors[:, :-1]) + origin[:, None])
        overlap, penalty = self.overlap_and_penalty(vectors, target_vectors, boxes, targets)
        return 1 - overlap + penalty

    def add_predictions(self, instances: Instances, landmarks: Tensor) -> None:
        """Enter predicted landmarks (N, V, 2), clipped to the image, into ``instances``, which has
        scores, boxes and classes."""
        prediction = self.prediction(
            landmarks, instances.scores, instances.pred_classes, instances.image_size
        )
        instances.set(self.pred_field, prediction)

    def prediction(
        self, landmarks: Tensor, scores: Tensor, classes: Tensor, image_size: tuple[int, int]
    ) -> Tensor:
        """What ``pred_field`` has.

        Args:
            landmarks: (N, V, 2).
            scores, classes: (N,), of the detections.
            image_size: (height, width), to which landmarks are clipped.
        """
        return clip_points(landmarks, image_size)

    def rescale_predictions(self, instances: Instances, scale: tuple[float, float]) -> None:
        """Multiply predicted landmarks by (scale_x, scale_y), in place, and clip them anew."""
        landmarks = instances.get(self.pred_field)
        landmarks = landmarks * landmarks.new_tensor(scale)
        instances.set(self.pred_field, clip_points(landmarks, instances.image_size))


def clip_points(points: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Limit points (..., 2) to an image of (height, width)."""
    height, width = image_size
    x, y = points.unbind(-1)
    return torch.stack([x.clamp(0, width), y.clamp(0, height)], dim=-1)


def span_boxes(landmarks: Tensor) -> Tensor:
    """The upright boxes (..., 4) XYXY around landmarks (..., V, 2)."""
    return torch.cat([landmarks.amin(dim=-2), landmarks.amax(dim=-2)], dim=-1)


def spread_indices(count: int, chosen: int) -> list[int]:
    """``chosen`` of ``count`` indices, evenly spread from 0 on; all of them if there are fewer."""
    chosen = min(count, chosen)
    return [index * count // chosen for index in range(chosen)]


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
    """

    name = "segm"
    pred_field = "pred_contours"
    # With 36 vertices the released code samples at these; its checkpoints depend on it.
    _SAMPLING = {36: [0, 5, 10, 15, 20, 25, 30, 35]}
    _VERTICES_PER_GROUP = 4

    def __init__(self, *, num_points: int = 36, **kwargs: Any) -> None:
        """
        Args:
            num_points: P, 8 to 128.

        Raises:
            ValueError: P is out of range; the message names the config's key.
        """
        if not 8 <= num_points <= 128:
            raise ValueError(
                f"MODEL.LSNET.NUM_CONTOUR_POINTS is {num_points}; it must be from 8 to 128"
            )
        sampling = self._SAMPLING.get(num_points, spread_indices(num_points, 8))
        super().__init__(num_landmarks=num_points, sampling_landmarks=sampling, **kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {"num_points": cfg.MODEL.LSNET.NUM_CONTOUR_POINTS}

    def targets(self, instances: Instances) -> LandmarkTargets:
        contours = instances.gt_contours
        present = contours.isfinite().all(dim=2).all(dim=1)
        contours = torch.where(present[:, None, None], contours, torch.zeros_like(contours))
        return LandmarkTargets.make(contours, span_boxes(contours), present=present)

    def boxes(self, landmarks: Tensor) -> Tensor:
        return span_boxes(landmarks)

    def flip_indices(self, dataset_names: Sequence[str]) -> list[int]:
        """The first vertex stays the first, and the direction is kept."""
        return [0, *range(self.num_landmarks - 1, 0, -1)]

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

    ``pred_keypoints`` is (N, K, 3): x, y, and the score of the detection; 0 for one of a class that
    has no keypoints.
    """

    name = "pose"
    pred_field = "pred_keypoints"
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
            classes: that have keypoints; none given: all.
            train_unlabelled: whether an object without labelled keypoints trains the vector to
                its centre, as in the released code. It needs another branch to give its box.

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
        places, visible = keypoints[..., :2], keypoints[..., 2] > 0
        low = places.masked_fill(~visible[..., None], torch.inf).amin(dim=1)
        high = places.masked_fill(~visible[..., None], -torch.inf).amax(dim=1)
        labelled = visible.any(dim=1)
        boxes = torch.cat([low, high], dim=1).masked_fill(~labelled[:, None], 0)
        present = labelled | self.train_unlabelled
        return LandmarkTargets.make(places, boxes, visible=visible, present=present)

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

    def rescale_predictions(self, instances: Instances, scale: tuple[float, float]) -> None:
        places = instances.get(self.pred_field)[..., :2]
        self.add_predictions(instances, places * places.new_tensor(scale))

    def prediction(self, landmarks, scores, classes, image_size):
        if self.classes:
            scores = scores * (classes[:, None] == classes.new_tensor(self.classes)).any(dim=1)
        scores = scores[:, None, None].expand(-1, self.num_landmarks, 1)
        places = clip_points(landmarks, image_size)
        return torch.cat([places, scores.to(places)], dim=2)


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
    if cfg.MODEL.LSNET.TRAIN_UNLABELLED_POSES and next(iter(weights)) == "keypoint":
        raise ValueError(
            "MODEL.LSNET.TRAIN_UNLABELLED_POSES is True, but where the keypoints supply the boxes "
            "an object without keypoints has none"
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

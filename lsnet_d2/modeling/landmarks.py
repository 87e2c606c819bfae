"""The landmark branch: what an object's landmarks are, and what follows from them.

A branch is a description without parameters of its own; the layers that predict its vectors are
the head's. The kinds of branches are in :mod:`.branches`.

Letters: G objects, N positive points, V landmarks, ``...`` any leading dimensions. Coordinates are
x, y in pixels of the network's input image, unless said otherwise.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from torch import Tensor

from .areas import SoftArea
from .vectors import decode_vectors, encode_vectors

NUM_SAMPLING_POINTS = 9
# Displacements in the third stage have this share of an object's size for their unit: in what it
# says, of the first branch's; in what it loses, of the branch's own.
DISPLACEMENT_UNIT = 0.1


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
        object_boxes: (G, 4) XYXY, of the whole objects, of which landmarks may show a part.
    """

    landmarks: Tensor
    boxes: Tensor
    centers: Tensor
    visible: Tensor
    present: Tensor
    object_boxes: Tensor

    @staticmethod
    def make(
        landmarks: Tensor,
        boxes: Tensor,
        visible: Tensor | None = None,
        present: Tensor | None = None,
        object_boxes: Tensor | None = None,
    ) -> "LandmarkTargets":
        """With the centres of the boxes; everything is visible and present if not given, and the
        boxes are those of the objects."""
        if visible is None:
            visible = torch.ones_like(landmarks[..., 0], dtype=torch.bool)
        if present is None:
            present = torch.ones_like(boxes[:, 0], dtype=torch.bool)
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        if object_boxes is None:
            object_boxes = boxes
        return LandmarkTargets(landmarks, boxes, centers, visible, present, object_boxes)

    def __getitem__(self, index: Tensor) -> "LandmarkTargets":
        index = as_indices(index)
        return LandmarkTargets(*(getattr(self, f.name)[index] for f in fields(self)))

    @property
    def points(self) -> Tensor:
        """(G, V + 1, 2): the landmarks and, last, the centre."""
        return torch.cat([self.landmarks, self.centers[:, None]], dim=1)

    @cached_property
    def area(self) -> SoftArea:
        """What the landmarks enclose, if they are an outline; the steps of a stage share it."""
        return SoftArea(self.landmarks)

    @staticmethod
    def cat(targets: list["LandmarkTargets"]) -> "LandmarkTargets":
        return LandmarkTargets(
            *(torch.cat([getattr(t, f.name) for t in targets]) for f in fields(LandmarkTargets))
        )


class LandmarkBranch(ABC):
    """One kind of landmarks.

    Attributes:
        name: that of the paper's task, in the names of losses (``loss_{name}_init``) and modules;
            the config has others (``branches.BRANCHES``).
        num_landmarks: V. The network predicts V + 1 vectors, the last to the centre of the box.
        sampling_landmarks: indices of the landmarks at which features are sampled. The centre is
            sampled too, and what is missing to nine points are free, learned displacements.
        pred_field: field of ``Instances`` that holds the predicted landmarks.
        outlined: whether the landmarks are an object's outline, which :mod:`.outlines` can map.
        searchable: whether each landmark looks like itself, so that :mod:`.search` can find it.
        traced_points: vertices of the final outline, if it is traced along a mask
            (:mod:`.mask_head`); 0: it has the landmarks.
        score_field: field that holds their scores; "scores" are those of the detections.
    """

    name: str
    pred_field: str
    score_field = "scores"
    outlined = False
    searchable = False
    traced_points = 0

    def __init__(
        self,
        *,
        num_landmarks: int,
        sampling_landmarks: list[int],
        alpha: float = 0.2,
        init_weight: float = 1.0,
        refine_weight: float = 2.0,
        polish_weight: float = 0.5,
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
            object_boxes=targets.object_boxes / unit,
        )
        target_vectors = encode_vectors(targets.points - origin[:, None], self.alpha)
        boxes = self.boxes(decode_vectors(vectors[:, :-1]) + origin[:, None])
        overlap, penalty = self.overlap_and_penalty(vectors, target_vectors, boxes, targets)
        return 1 - overlap + penalty

    def freedom(self, landmarks: Tensor) -> tuple[Tensor, Tensor]:
        """Where the third stage may put landmarks without losing much.

        Args:
            landmarks: (N, V, 2), the true ones.

        Returns:
            Unit vectors (N, V, 2) across which a landmark must not be off, and the cost (N, V) of
            being off along the outline, relative to across. Here both cost the same.
        """
        across = landmarks.new_tensor([1.0, 0.0]).expand_as(landmarks)
        return across, torch.ones_like(landmarks[..., 0])

    def displacement_loss(self, landmarks: Tensor, targets: LandmarkTargets) -> Tensor:
        """Loss of the third stage, of each point: how far its landmarks (N, V, 2) are off.

        The mean over visible landmarks of the distances along and across the outline, weighted by
        :meth:`freedom`, in units of a share of the object's size, the larger one of the true and
        the predicted object.

        Returns:
            (N,).
        """
        size = torch.maximum(
            _diagonal(targets.boxes), _diagonal(span_boxes(landmarks.detach()))
        ).clamp(min=1)
        error = (landmarks - targets.landmarks) / (DISPLACEMENT_UNIT * size[:, None, None])
        across, cost = self.freedom(targets.landmarks)
        along = torch.stack([-across[..., 1], across[..., 0]], dim=-1)
        distance = (error * across).sum(-1).abs() + cost * (error * along).sum(-1).abs()
        visible = targets.visible.to(distance)
        return (distance * visible).sum(1) / visible.sum(1).clamp(min=1)

    @abstractmethod
    def quality(self, landmarks: Tensor, targets: LandmarkTargets) -> Tensor:
        """How good predicted landmarks (N, V, 2) are: (N,) from 0 to 1, an IOU or the like."""

    def add_predictions(self, instances: Instances, landmarks: Tensor, scores: Tensor) -> None:
        """Enter predicted landmarks (N, V, 2), clipped to the image, into ``instances``, which has
        scores, boxes and classes.

        Args:
            scores: (N,), of the landmarks. Those of the first branch are ``instances.scores``.
        """
        places, scores = self.prediction(
            landmarks, scores, instances.pred_classes, instances.image_size
        )
        instances.set(self.pred_field, places)
        if self.score_field != "scores":
            instances.set(self.score_field, scores)

    def prediction(
        self, landmarks: Tensor, scores: Tensor, classes: Tensor, image_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """What ``pred_field`` and ``score_field`` have.

        Args:
            landmarks: (N, V, 2).
            scores: (N,), of the landmarks.
            classes: (N,).
            image_size: (height, width), to which landmarks are clipped.
        """
        return clip_points(landmarks, image_size), scores

    def scores(self, instances: Instances) -> Tensor:
        """(N,), the scores of the landmarks in ``instances``."""
        return instances.get(self.score_field)

    def rescale_predictions(self, instances: Instances, scale: tuple[float, float]) -> None:
        """Multiply predicted landmarks by (scale_x, scale_y), in place, and clip them anew."""
        landmarks = instances.get(self.pred_field)
        landmarks = landmarks * landmarks.new_tensor(scale)
        instances.set(self.pred_field, clip_points(landmarks, instances.image_size))


def as_indices(index: Tensor) -> Tensor:
    """``index`` as indices, also where it is a mask (N,).

    With a mask the host would wait for the GPU once for each tensor that is indexed.
    """
    return torch.nonzero(index).squeeze(1) if index.dtype == torch.bool else index


def clip_points(points: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Limit points (..., 2) to an image of (height, width)."""
    height, width = image_size
    x, y = points.unbind(-1)
    return torch.stack([x.clamp(0, width), y.clamp(0, height)], dim=-1)


def span_boxes(landmarks: Tensor) -> Tensor:
    """The upright boxes (..., 4) XYXY around landmarks (..., V, 2)."""
    return torch.cat([landmarks.amin(dim=-2), landmarks.amax(dim=-2)], dim=-1)


def _diagonal(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).norm(dim=1)


def spread_indices(count: int, chosen: int) -> list[int]:
    """``chosen`` of ``count`` indices, evenly spread from 0 on; all of them if there are fewer."""
    chosen = min(count, chosen)
    return [index * count // chosen for index in range(chosen)]

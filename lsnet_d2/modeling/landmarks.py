"""The landmark branch: what an object's landmarks are, and what follows from them.

A branch is a description without parameters of its own; the layers that predict its vectors are
the head's. Everything in which boxes with extreme points, contours and poses differ is here.

Letters: G objects, N positive points, V landmarks, ``...`` any leading dimensions. Coordinates are
x, y in pixels of the network's input image, unless said otherwise.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from torch import Tensor

from .losses import box_penalty, cross_iou
from .vectors import decode_vectors, encode_vectors

NUM_SAMPLING_POINTS = 9


@dataclass
class LandmarkTargets:
    """Ground truth of one branch.

    Attributes:
        landmarks: (G, V, 2).
        boxes: (G, 4) XYXY, the boxes that belong to the landmarks.
    """

    landmarks: Tensor
    boxes: Tensor

    def __getitem__(self, index: Tensor) -> "LandmarkTargets":
        return LandmarkTargets(self.landmarks[index], self.boxes[index])

    @property
    def points(self) -> Tensor:
        """(G, V + 1, 2): the landmarks and, last, the centre of the box."""
        centers = (self.boxes[:, :2] + self.boxes[:, 2:]) / 2
        return torch.cat([self.landmarks, centers[:, None]], dim=1)

    @staticmethod
    def cat(targets: list["LandmarkTargets"]) -> "LandmarkTargets":
        return LandmarkTargets(
            torch.cat([t.landmarks for t in targets]), torch.cat([t.boxes for t in targets])
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
    num_landmarks: int
    sampling_landmarks: list[int]
    pred_field: str

    def __init__(
        self, *, alpha: float = 0.2, init_weight: float = 1.0, refine_weight: float = 2.0
    ) -> None:
        """
        Args:
            alpha: see :func:`~lsnet_d2.modeling.vectors.encode_vectors`.
            init_weight, refine_weight: of the losses of the two stages.
        """
        self.alpha = alpha
        self.init_weight = init_weight
        self.refine_weight = refine_weight

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
        targets = LandmarkTargets(targets.landmarks / unit[..., None], targets.boxes / unit)
        target_vectors = encode_vectors(targets.points - origin[:, None], self.alpha)
        boxes = self.boxes(decode_vectors(vectors[:, :-1]) + origin[:, None])
        overlap, penalty = self.overlap_and_penalty(vectors, target_vectors, boxes, targets)
        return 1 - overlap + penalty

    def add_predictions(self, instances: Instances, landmarks: Tensor) -> None:
        """Enter predicted landmarks (N, V, 2), clipped to the image, into ``instances``."""
        instances.set(self.pred_field, clip_points(landmarks, instances.image_size))

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


class ExtremeBranch(LandmarkBranch):
    """Top, left, bottom and right extreme points. The box lies between them.

    Ground truth: ``gt_extreme_points`` (G, 4, 2) in this order, and ``gt_boxes``.
    """

    name = "bbox"
    num_landmarks = 4
    sampling_landmarks = [0, 1, 2, 3]
    pred_field = "pred_extreme_points"

    def targets(self, instances: Instances) -> LandmarkTargets:
        return LandmarkTargets(instances.gt_extreme_points, instances.gt_boxes.tensor)

    def boxes(self, landmarks: Tensor) -> Tensor:
        top, left, bottom, right = landmarks.unbind(-2)
        return torch.stack([left[..., 0], top[..., 1], right[..., 0], bottom[..., 1]], dim=-1)

    def overlap_and_penalty(self, vectors, target_vectors, boxes, targets):
        overlap = cross_iou(vectors, target_vectors)
        return overlap, box_penalty(boxes, targets.boxes, overlap)


BRANCHES: dict[str, type[LandmarkBranch]] = {"extreme": ExtremeBranch}
TASK_BRANCHES = {"bbox": ["extreme"]}


def build_branches(cfg: CfgNode) -> list[LandmarkBranch]:
    """The branches of MODEL.LSNET.TASK. The first supplies boxes, the last steers classification.

    Raises:
        ValueError: the task or a branch is unknown, or a branch has no loss weights; the message
            names the key.
    """
    task = cfg.MODEL.LSNET.TASK
    names = cfg.MODEL.LSNET.BRANCHES if task == "joint" else TASK_BRANCHES.get(task)
    if names is None:
        known = ", ".join([*TASK_BRANCHES, "joint"])
        raise ValueError(f"MODEL.LSNET.TASK is {task!r}; it must be one of {known}")
    unknown = [name for name in names if name not in BRANCHES]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(
            f"MODEL.LSNET.BRANCHES is {list(names)}; it must list one or more of "
            f"{', '.join(BRANCHES)}, each once"
        )
    init, refine = cfg.MODEL.LSNET.INIT_LOSS_WEIGHTS, cfg.MODEL.LSNET.REFINE_LOSS_WEIGHTS
    for key, weights in (("INIT", init), ("REFINE", refine)):
        if len(weights) != len(names):
            raise ValueError(
                f"MODEL.LSNET.{key}_LOSS_WEIGHTS is {list(weights)}; it must have one value for "
                f"each of the branches {', '.join(names)}"
            )
    return [
        BRANCHES[name](
            alpha=cfg.MODEL.LSNET.CROSS_IOU_ALPHA, init_weight=w_init, refine_weight=w_refine
        )
        for name, w_init, w_refine in zip(names, init, refine, strict=True)
    ]

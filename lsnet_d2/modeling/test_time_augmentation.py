"""Test-time augmentation: detections of an image in several sizes and mirrored, put together.

Detectron2's ``GeneralizedRCNNWithTTA`` pools region features of the merged boxes; here every
detection brings its landmarks along, and they are voted on together with its box. This is the
multi-scale testing of the paper, which follows ATSS.

Letters: N detections, V landmarks of all branches together.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.data.transforms import HFlipTransform, ResizeShortestEdge, TransformList
from detectron2.layers import batched_nms
from detectron2.modeling.test_time_augmentation import DatasetMapperTTA
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data.images import check_resizing
from .landmarks import LandmarkBranch
from .lsnet import LSNet
from .postprocessing import make_instances, rescale_instances

__all__ = ["LSNetDatasetMapperTTA", "LSNetWithTTA", "keep_image_sizes"]

MERGE_METHODS = ("vote", "nms")
_TINY = 1e-12


def keep_image_sizes(cfg: CfgNode) -> CfgNode:
    """A copy of the config by which test images are not resized: augmentation does that, once.

    Detectron2 augments images that have been resized to ``INPUT.MIN_SIZE_TEST`` before.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.MIN_SIZE_TEST = 0  # Detectron2's way to say it
    return cfg


def check_merging(method: str, vote_iou: float) -> None:
    """
    Raises:
        ValueError: no such method, or no IOU; the message names the config's key.
    """
    if method not in MERGE_METHODS:
        raise ValueError(
            f"TEST.AUG.METHOD is {method!r}; it must be one of {', '.join(MERGE_METHODS)}"
        )
    if not 0 < vote_iou <= 1:
        raise ValueError(f"TEST.AUG.VOTE_IOU is {vote_iou}; it must be over 0 and at most 1")


def batches_of_one_size(inputs: Iterable[dict], batch_size: int) -> Iterator[list[dict]]:
    """Successive inputs in batches, each with images of one size.

    A smaller image in a batch is padded, over which group norm averages: its detections would
    depend on its company.
    """
    for _, same in groupby(inputs, key=lambda x: x["image"].shape):
        while batch := list(islice(same, batch_size)):
            yield batch


class LSNetDatasetMapperTTA(DatasetMapperTTA):
    """Detectron2's mapper, which also says which sizes of objects count in which image.

    Each output has ``size_range`` besides ``transforms``: (low, high), the least and the largest
    square root of a box's area, in pixels of the augmented image.
    """

    @configurable
    def __init__(
        self,
        *,
        min_sizes: Sequence[int],
        max_size: int,
        flip: bool,
        size_ranges: Sequence[tuple[float, float]] = (),
    ) -> None:
        """
        Args:
            min_sizes, max_size, flip: see :class:`DatasetMapperTTA`.
            size_ranges: one for each of ``min_sizes``; none: all sizes.

        Raises:
            ValueError: these do not fit together; the message names the config's key.
        """
        if not min_sizes or not all(isinstance(size, int) and size > 0 for size in min_sizes):
            raise ValueError(
                f"TEST.AUG.MIN_SIZES is {list(min_sizes)}; it must list one or more sizes"
            )
        if max_size < 1:
            raise ValueError(f"TEST.AUG.MAX_SIZE is {max_size}; it must be 1 or more")
        if size_ranges and len(size_ranges) != len(min_sizes):
            raise ValueError(
                f"TEST.AUG.SIZE_RANGES has {len(size_ranges)} ranges; it must have one for each "
                f"of the {len(min_sizes)} TEST.AUG.MIN_SIZES, or none"
            )
        for bounds in size_ranges:
            if not _is_range(bounds):
                raise ValueError(
                    f"TEST.AUG.SIZE_RANGES has {bounds!r}; a range is two numbers [low, high], "
                    "0 <= low < high"
                )
        super().__init__(min_sizes=list(min_sizes), max_size=max_size, flip=flip)
        self.size_ranges = list(size_ranges) or [(0, float("inf"))] * len(min_sizes)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {**super().from_config(cfg), "size_ranges": cfg.TEST.AUG.SIZE_RANGES}

    def __call__(self, dataset_dict: dict) -> list[dict]:
        """
        Args:
            dataset_dict: with "image" (C, H, W) on the CPU, "height" and "width", and for
                messages "file_name".

        Raises:
            ImageError: in one of the sizes nothing is left of the image.
        """
        height, width = dataset_dict["image"].shape[1:]
        for size in self.min_sizes:
            resized = ResizeShortestEdge.get_output_shape(height, width, size, self.max_size)
            check_resizing(dataset_dict.get("file_name", "image"), (height, width), resized)
        augmented = super().__call__(dataset_dict)
        copies = len(augmented) // len(self.size_ranges)
        for index, image in enumerate(augmented):
            image["size_range"] = self.size_ranges[index // copies]
        return augmented


def _is_range(bounds: Any) -> bool:
    numbers = isinstance(bounds, (list, tuple)) and all(isinstance(b, (int, float)) for b in bounds)
    return numbers and len(bounds) == 2 and 0 <= bounds[0] < bounds[1]


class LSNetWithTTA(nn.Module):
    """LSNet with test-time augmentation, with the inputs and outputs of LSNet at test time.

    Images are best given in their original size (see :func:`keep_image_sizes`).
    """

    @configurable
    def __init__(
        self,
        model: nn.Module,
        *,
        tta_mapper: Callable[[dict], list[dict]],
        flip_indices: Sequence[Sequence[int]],
        method: str = "vote",
        vote_iou: float = 0.66,
        outlines_vote: bool = True,
        max_detections_per_image: int = 100,
        batch_size: int = 2,
    ) -> None:
        """
        Args:
            model: an :class:`LSNet`, or one in ``DistributedDataParallel``.
            tta_mapper: from an input to its augmented versions, as :class:`LSNetDatasetMapperTTA`.
            flip_indices: of each branch; see :meth:`LandmarkBranch.flip_indices`.
            method: "vote" (see :func:`vote`), or "nms", which keeps the best of what overlaps.
            vote_iou: of a box with the best one, from which on they vote together.
            outlines_vote: whether vertices of outlines vote too, unless these are traced. They must
                not where mirroring an image changes their order in more than
                :meth:`LandmarkBranch.flip_indices` undoes.
            max_detections_per_image: after merging. Before, the model has its own.
            batch_size: augmented images, all of one size, that are run at once.

        Raises:
            TypeError: the model is none.
            ValueError: see :func:`check_merging`.
        """
        super().__init__()
        if isinstance(model, DistributedDataParallel):
            model = model.module
        if not isinstance(model, LSNet):
            raise TypeError(f"LSNetWithTTA takes an LSNet, not {type(model).__name__}")
        check_merging(method, vote_iou)
        self.model = model
        self.tta_mapper = tta_mapper
        self.flip_indices = [list(indices) for indices in flip_indices]
        self.method = method
        self.vote_iou = vote_iou
        self.outlines_vote = outlines_vote
        self.max_detections_per_image = max_detections_per_image
        self.batch_size = batch_size
        self.train(model.training)

    @classmethod
    def from_config(cls, cfg: CfgNode, model: nn.Module, batch_size: int = 2) -> dict[str, Any]:
        """With ``TEST.AUG.FLIP`` the data sets of the config must have been read: some learn then
        what their keypoints are, without which they cannot be mirrored."""
        branches = getattr(model, "module", model).branches
        data_sets = [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN]
        return {
            "model": model,
            "tta_mapper": LSNetDatasetMapperTTA(cfg),
            "flip_indices": [
                branch.flip_indices(data_sets) if cfg.TEST.AUG.FLIP else []  # of no use then
                for branch in branches
            ],
            "method": cfg.TEST.AUG.METHOD,
            "vote_iou": cfg.TEST.AUG.VOTE_IOU,
            # Where there are holes, vertices along all outlines of an object have another order in
            # the mirrored image; those of the released code run along one outline.
            "outlines_vote": not cfg.TEST.AUG.FLIP or cfg.INPUT.CONTOUR_SAMPLING == "reference",
            "max_detections_per_image": cfg.TEST.AUG.DETECTIONS_PER_IMAGE
            or cfg.TEST.DETECTIONS_PER_IMAGE,
            "batch_size": batch_size,
        }

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """As LSNet's in evaluation. Images must be on the CPU."""
        assert not self.training, "augmentation is for tests: call eval() before"
        return [{"instances": self.inference_single_image(x)} for x in batched_inputs]

    def inference_single_image(self, inputs: dict) -> Instances:
        """Detections in pixels of the original image."""
        height, width = inputs["image"].shape[-2:]
        size = (inputs.get("height", height), inputs.get("width", width))
        inputs = {**inputs, "height": size[0], "width": size[1]}
        found = []
        for batch in batches_of_one_size(self.tta_mapper(inputs), self.batch_size):
            detections = self.model(batch, do_postprocess=False)
            for augmented, instances in zip(batch, detections, strict=True):
                chosen = boxes_in_range(instances.pred_boxes, *augmented["size_range"])
                found.append(
                    map_back(
                        instances[chosen],
                        augmented["transforms"],
                        size,
                        self.model.branches,
                        self.flip_indices,
                    )
                )
        merged = self.merge(Instances.cat(found))
        results = rescale_instances(
            merged, *size, self.model.branches, min_box_area=self.model.test_min_box_area
        )
        return results.to(self.model.device)

    def merge(self, instances: Instances) -> Instances:
        """The detections of all augmented images, in pixels of the original one, put together."""
        branches = self.model.branches
        found = [instances.get(branch.pred_field)[..., :2] for branch in branches]
        detections = (
            instances.pred_boxes.tensor,
            torch.cat(found, dim=1),
            instances.scores,
            instances.pred_classes,
        )
        if self.method == "vote":
            *detections, best = vote(
                *detections, iou_thresh=self.vote_iou, score_thresh=self.model.test_score_thresh
            )
        else:
            boxes, _, scores, classes = detections
            best = batched_nms(boxes, scores, classes, self.model.test_nms_thresh)
            detections = [values[best] for values in detections]
        *detections, best = (x[: self.max_detections_per_image] for x in (*detections, best))
        boxes, means, scores, classes = detections
        means = list(means.split([points.shape[1] for points in found], dim=1))
        for number, branch in enumerate(branches):
            votes = not branch.outlined or (self.outlines_vote and not branch.traced_points)
            if self.method != "vote" or not votes:
                means[number] = found[number][best]
        # Landmarks are as much better or worse than the object as in its best detection.
        gain = scores / instances.scores[best].clamp(min=_TINY)
        own_scores = [branch.scores(instances)[best] * gain for branch in branches]
        return make_instances(
            instances.image_size, boxes, scores, classes, branches, means, own_scores
        )


def boxes_in_range(boxes: Boxes, low: float, high: float) -> Tensor:
    """(N,) bool: boxes, not inverted ones, with an area of low^2 to high^2."""
    area = boxes.area()
    return boxes.nonempty() & (area >= low**2) & (area <= high**2)


def map_back(
    instances: Instances,
    transforms: TransformList,
    size: tuple[int, int],
    branches: list[LandmarkBranch],
    flip_indices: Sequence[Sequence[int]],
) -> Instances:
    """Detections in pixels of the original image, on the CPU.

    Args:
        instances: in pixels of the augmented image.
        transforms: that made it from the original image.
        size: (height, width) of the original image.
        flip_indices: of each branch.
    """
    instances = instances.to("cpu")
    inverse = transforms.inverse()
    flips = sum(isinstance(t, HFlipTransform) for t in transforms.transforms)
    landmarks = []
    for branch, indices in zip(branches, flip_indices, strict=True):
        points = instances.get(branch.pred_field)[..., :2]
        if flips % 2:
            points = points[:, indices]
        # a copy, as transforms work in place
        moved = inverse.apply_coords(points.reshape(-1, 2).clone().numpy())
        landmarks.append(torch.from_numpy(moved).view(points.shape))
    boxes = torch.from_numpy(inverse.apply_box(instances.pred_boxes.tensor.numpy()))
    return make_instances(
        size,
        boxes,
        instances.scores,
        instances.pred_classes,
        branches,
        landmarks,
        [branch.scores(instances) for branch in branches],
    )


def vote(
    boxes: Tensor,
    landmarks: Tensor,
    scores: Tensor,
    classes: Tensor,
    *,
    iou_thresh: float,
    score_thresh: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Mean boxes and landmarks of the detections that overlap.

    The best detection and those of its class that overlap it become one: their mean weighted with
    their scores, with the best score. This is repeated with what is left. Of those that became
    one, detections with another place than the best are kept as well, as far as the score is above
    ``score_thresh`` when it is multiplied by 1 - IOU.

    Args:
        boxes: (N, 4) XYXY; empty ones overlap nothing.
        landmarks: (N, V, 2).
        scores: (N,), positive.
        classes: (N,).
        iou_thresh: boxes with this IOU overlap.

    Returns:
        The same four of the merged detections, at most N, best first; and (M,) the number of each
        one's best detection in the input.
    """
    by_score = scores.argsort(descending=True, stable=True)
    boxes, landmarks, scores, classes = (x[by_score] for x in (boxes, landmarks, scores, classes))
    overlaps = pairwise_iou(Boxes(boxes), Boxes(boxes)).fill_diagonal_(1)
    together = (overlaps >= iou_thresh) & (classes[:, None] == classes)
    leader = torch.full_like(classes, -1)
    for index in range(len(boxes)):
        if leader[index] < 0:
            leader[together[index] & (leader < 0)] = index

    leaders, group = leader.unique(return_inverse=True)
    places = torch.cat([boxes.unflatten(1, (2, 2)), landmarks], dim=1)
    weights = scores.double()[:, None, None]
    sums = weights.new_zeros(len(leaders), *places.shape[1:]).index_add_(0, group, weights * places)
    totals = weights.new_zeros(len(leaders), 1, 1).index_add_(0, group, weights)
    means = (sums / totals).to(places)

    members = torch.arange(len(boxes), device=boxes.device)
    lowered = scores * (1 - overlaps[leader, members])
    kept = torch.nonzero(lowered > score_thresh).squeeze(1)

    places = torch.cat([means, places[kept]])
    scores = torch.cat([scores[leaders], lowered[kept]])
    best = torch.cat([leaders, kept])
    classes = classes[best]
    order = scores.argsort(descending=True, stable=True)
    boxes, landmarks = places[:, :2].flatten(1), places[:, 2:]
    return boxes[order], landmarks[order], scores[order], classes[order], by_score[best[order]]

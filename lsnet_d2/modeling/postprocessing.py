"""From dense predictions to detections.

Letters: A anchor points of one image, K classes, V landmarks.
"""

import torch
import torch.nn.functional as F
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import box_iou

from .landmarks import LandmarkBranch, as_indices, clip_points


def top_points(scores: Tensor, points_per_level: list[int], topk: int) -> Tensor:
    """Indices of the ``topk`` points of each level with the highest score of any class.

    Args:
        scores: (A, K).
        points_per_level: they add up to A.
    """
    best = scores.amax(dim=1)
    start, kept = 0, []
    for count in points_per_level:
        exporting = torch.compiler.is_exporting()  # counts are symbols
        if exporting or count > topk:
            of_level = best[start : start + count]
            limit = torch.sym_min(count, topk) if exporting else topk
            kept.append(of_level.topk(limit).indices + start)
        else:
            kept.append(torch.arange(start, start + count, device=scores.device))
        start += count
    return torch.cat(kept)


def clip_boxes(boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Limit boxes (..., 4) XYXY to an image of (height, width)."""
    return clip_points(boxes.unflatten(-1, (2, 2)), image_size).flatten(-2)


def select_detections(
    boxes: Tensor,
    scores: Tensor,
    *,
    score_thresh: float,
    nms_thresh: float,
    max_detections: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-class NMS over all (point, class) pairs above a threshold.

    Args:
        boxes: (A, 4) XYXY; inverted ones take part, as in the released code.
        scores: (A, K).

    Returns:
        point (D,), class (D,) and score (D,) of the detections, best first.
    """
    if torch.compiler.is_exporting():
        return selection_operator(boxes, scores, score_thresh, nms_thresh, max_detections)
    points, classes = torch.nonzero(scores > score_thresh, as_tuple=True)
    scores = scores[points, classes]
    keep = batched_nms(boxes[points], scores, classes, nms_thresh)[:max_detections]
    return points[keep], classes[keep], scores[keep]


@torch.library.custom_op("lsnet_d2::select_detections", mutates_args=())
def selection_operator(
    boxes: Tensor, scores: Tensor, score_thresh: float, nms_thresh: float, max_detections: int
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`select_detections` as one operator: in an exported model it cannot be a loop."""
    return select_detections(
        boxes,
        scores,
        score_thresh=score_thresh,
        nms_thresh=nms_thresh,
        max_detections=max_detections,
    )


@selection_operator.register_fake
def _(boxes, scores, score_thresh, nms_thresh, max_detections):
    count = torch.library.get_ctx().new_dynamic_size()
    indices = boxes.new_empty(count, dtype=torch.int64)
    return indices, torch.empty_like(indices), scores.new_empty(count)


def overlap_decay(boxes: Tensor, classes: Tensor, sigma: float) -> Tensor:
    """What scores are multiplied by for a better detection of the class being near.

    That is the Gaussian of Soft-NMS (arXiv 1704.04503), exp(-IOU^2 / sigma), for the best
    detection's IOU alone that overlaps most; so it needs no loop.

    Args:
        boxes: (D, 4) XYXY, best first.
        classes: (D,).

    Returns:
        (D,), from 0 to 1.
    """
    overlap = box_iou(boxes, boxes).nan_to_num(0) * (classes[:, None] == classes)  # empty boxes
    most = F.pad(overlap.tril(-1), (1, 0)).amax(dim=1).clamp(0, 1)  # 0 for the first one
    return (-most.square() / sigma).exp()


def make_instances(
    image_size: tuple[int, int],
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    branches: list[LandmarkBranch],
    landmarks: list[Tensor],
    landmark_scores: list[Tensor] | None = None,
) -> Instances:
    """Detections of one image in pixels of the network's input, clipped to ``image_size``.

    Args:
        image_size: (height, width).
        boxes: (D, 4) XYXY.
        scores, classes: (D,).
        landmarks: per branch (D, V, 2).
        landmark_scores: per branch (D,); None: ``scores``.
    """
    instances = Instances(image_size)
    instances.pred_boxes = Boxes(boxes)
    instances.pred_boxes.clip(image_size)
    instances.scores = scores
    instances.pred_classes = classes
    if landmark_scores is None:
        landmark_scores = [scores] * len(branches)
    for branch, points, own in zip(branches, landmarks, landmark_scores, strict=True):
        branch.add_predictions(instances, points, own)
    return instances


def rescale_instances(
    instances: Instances,
    height: int,
    width: int,
    branches: list[LandmarkBranch],
    *,
    min_box_area: float = 0.0,
) -> Instances:
    """Detections in pixels of an image of another size.

    Detections whose box has no area, or none above ``min_box_area`` in square pixels of that image,
    are dropped. (Detectron2's ``detector_postprocess`` scales keypoints in place and takes masks
    for those of regions.)
    """
    scale = (width / instances.image_size[1], height / instances.image_size[0])
    results = Instances((height, width), **instances.get_fields())
    results.pred_boxes = instances.pred_boxes.clone()
    results.pred_boxes.scale(*scale)
    results.pred_boxes.clip(results.image_size)
    kept = results.pred_boxes.nonempty() & (results.pred_boxes.area() > min_box_area)
    results = results[as_indices(kept)]
    for branch in branches:
        branch.rescale_predictions(results, scale)
    return results

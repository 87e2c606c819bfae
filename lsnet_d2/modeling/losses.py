"""Cross-IOU losses of landmark vectors (paper, section 3.2), their box terms, heat map losses.

All functions return one value per point, so that the caller decides on weights and normalisers.
Those of vectors work on positive anchor points only, in any one unit of length.

Letters: N positive points, V landmarks. Predictions have V + 1 vectors: the last one points to the
centre of the object's box.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-6


def _cross_iou(pred: Tensor, target: Tensor, dims: tuple[int, ...]) -> Tensor:
    intersection = torch.minimum(pred, target).sum(dims)
    union = torch.maximum(pred, target).sum(dims)
    return intersection / union.clamp(min=_EPS)


def cross_iou(pred: Tensor, target: Tensor) -> Tensor:
    """One ratio over all components of all vectors.

    Args:
        pred, target: (N, V + 1, 4) non-negative components, see :mod:`.vectors`.

    Returns:
        (N,), 1 for a perfect prediction.
    """
    return _cross_iou(pred, target, (1, 2))


def cross_iou_grouped(pred: Tensor, target: Tensor, num_groups: int) -> Tensor:
    """Mean of the ratios of interleaved groups: group g has the vectors g, g + num_groups, ...

    Args:
        pred, target: (N, V + 1, 4).
        num_groups: number of groups; every one should hold vectors from all around the contour.

    Returns:
        (N,).
    """
    groups = [
        _cross_iou(pred[:, g::num_groups], target[:, g::num_groups], (1, 2))
        for g in range(num_groups)
    ]
    return torch.stack(groups, dim=1).mean(dim=1)


def cross_iou_per_coordinate(pred: Tensor, target: Tensor, visible: Tensor) -> Tensor:
    """Mean of one ratio per coordinate; those of invisible landmarks count as 0.

    As in the released code the mean is over *all* coordinates, so an object with invisible
    landmarks cannot reach 1.

    Args:
        pred, target: (N, V + 1, 4).
        visible: (N, V) bool. The centre vector always counts.

    Returns:
        (N,).
    """
    num_points, num_vectors, _ = pred.shape
    shape = (num_points, num_vectors, 2, 2)
    # In this reduction the released code bounds each component, not their sum, from below.
    pred, target = pred.reshape(shape), target.reshape(shape)
    union = torch.maximum(pred, target).clamp(min=_EPS).sum(-1)
    ratio = torch.minimum(pred, target).sum(-1) / union
    visible = torch.cat([visible, visible.new_ones(num_points, 1)], dim=1)
    return (ratio * visible[:, :, None]).mean(dim=(1, 2))


def box_penalty(pred_boxes: Tensor, gt_boxes: Tensor, overlap: Tensor) -> Tensor:
    """Distance and aspect-ratio terms as in CIoU (arXiv 1911.08287) with the cross-IOU for the IoU.

    Unlike in CIoU, gradients flow through the weight of the aspect-ratio term, as in the released
    code. There an exact prediction gives 0 / 0; here it gives 0.

    Args:
        pred_boxes, gt_boxes: (N, 4) XYXY. Predicted boxes may be inverted.
        overlap: (N,), cross-IOU of the same points.

    Returns:
        (N,), 0 for equal boxes.
    """
    pred_size = pred_boxes[:, 2:] - pred_boxes[:, :2]
    gt_size = gt_boxes[:, 2:] - gt_boxes[:, :2]
    enclosing = (
        torch.maximum(pred_boxes[:, 2:], gt_boxes[:, 2:])
        - torch.minimum(pred_boxes[:, :2], gt_boxes[:, :2])
    ).clamp(min=0)
    diagonal = enclosing.square().sum(1) + _EPS
    centre_shift = pred_boxes[:, :2] + pred_boxes[:, 2:] - gt_boxes[:, :2] - gt_boxes[:, 2:]
    distance = centre_shift.square().sum(1) / 4

    angle = torch.atan(gt_size[:, 0] / (gt_size[:, 1] + _EPS)) - torch.atan(
        pred_size[:, 0] / (pred_size[:, 1] + _EPS)
    )
    aspect = 4 / math.pi**2 * angle.square()
    return distance / diagonal + aspect.square() / (1 - overlap + aspect).clamp(min=_EPS)


def quality_focal_loss(logits: Tensor, target: Tensor, *, gamma: float = 2.0) -> Tensor:
    """Focal loss whose targets are qualities (arXiv 2006.04388).

    Args:
        logits: any shape.
        target: same shape, in [0, 1].
        gamma: exponent of the score's error.

    Returns:
        same shape, least where scores are the targets.
    """
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (target - logits.sigmoid()).abs() ** gamma * loss


def gaussian_focal_loss(
    logits: Tensor, target: Tensor, *, alpha: float = 2.0, gamma: float = 4.0
) -> Tensor:
    """Focal loss of heat maps (CornerNet, arXiv 1808.01244): near a peak less is lost.

    Args:
        logits: any shape.
        target: same shape, in [0, 1], 1 at the peaks.
        alpha: exponent of the score's error.
        gamma: exponent of 1 minus the target where it is not 1.

    Returns:
        same shape.
    """
    scores = logits.sigmoid()
    peak = -((1 - scores) ** alpha) * F.logsigmoid(logits)
    other = -(scores**alpha) * (1 - target) ** gamma * F.logsigmoid(-logits)
    return torch.where(target == 1, peak, other)

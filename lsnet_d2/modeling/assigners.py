"""Which anchor points learn which object.

Letters: A anchor points of all levels, level by level, and G ground-truth objects of one image. An
assignment is an (A,) int64 tensor: the index of the point's object, or -1 for none.
"""

import torch
from torch import Tensor

_NONE = -1
_EPS_SIZE = 1e-6
# A centre nearer than this to a side of an object's box does not count as inside; image pixels.
_MARGIN = 0.01
# Distances that are in memory at once, of some objects to points of a level: 1 MB.
_DISTANCES_AT_ONCE = 1 << 18
# Points of a level that are left out or looked at together, in the order of their numbers.
_BLOCK = 32


def assign_nearest(
    points: Tensor,
    strides: list[int],
    points_per_level: list[int],
    gt_boxes: Tensor,
    *,
    valid: Tensor | None = None,
    gt_centers: Tensor | None = None,
    base_scale: float = 4.0,
    num_positives: int = 1,
) -> Tensor:
    """Init stage: every object takes the nearest point of the level that suits its size.

    The level is that with log2(stride) = log2(sqrt(w * h) / base_scale), rounded down and limited
    to those there are. Distances are relative to the object's width and height. Where two objects
    want one point the nearer gets it, and the other none (released code, centroid_assigner).

    Args:
        points: (A, 2) x, y in image pixels.
        strides: stride of each level, powers of two, ascending.
        points_per_level: number of points of each level; they add up to A.
        gt_boxes: (G, 4) XYXY in image pixels.
        valid: (A,) bool, points that may be assigned; None: all.
        gt_centers: (G, 2), where the nearest point is sought; None: the centres of the boxes.
        num_positives: points that each object takes.
    """
    num_points = len(points)
    if len(gt_boxes) == 0:
        return points.new_full((num_points,), _NONE, dtype=torch.int64)
    if gt_centers is None:
        gt_centers = (gt_boxes[:, :2] + gt_boxes[:, 2:]) / 2
    gt_sizes = (gt_boxes[:, 2:] - gt_boxes[:, :2]).clamp(min=_EPS_SIZE)
    first, last = stride_log2(strides[0]), stride_log2(strides[-1])
    gt_levels = torch.log2(gt_sizes / base_scale).mean(dim=1).int().clamp(first, last)
    order = gt_levels.argsort(stable=True)
    gt_levels = gt_levels.tolist()  # the host waits once, not at each level
    of_levels = order.split([gt_levels.count(stride_log2(stride)) for stride in strides])

    places = _places(points, valid)
    chosen, owners, costs = [], [], []
    start = 0
    for objects, count in zip(of_levels, points_per_level, strict=True):
        level = slice(start, start + count)
        distance, nearest = _nearest(
            places[level], gt_centers[objects], gt_sizes[objects], min(num_positives, count)
        )
        chosen.append((nearest + start).flatten())
        owners.append(objects[:, None].expand_as(nearest).flatten())
        costs.append(distance.flatten())
        start += count
    return lowest_cost(num_points, torch.cat(chosen), torch.cat(owners), torch.cat(costs))


def assign_atss(
    boxes: Tensor,
    points_per_level: list[int],
    gt_boxes: Tensor,
    *,
    valid: Tensor | None = None,
    topk: int = 9,
) -> tuple[Tensor, Tensor]:
    """Refine stage: adaptive training sample selection (arXiv 1912.02424) on predicted boxes.

    On every level the ``topk`` boxes with the nearest centres are an object's candidates. Those
    whose IoU reaches the candidates' mean plus standard deviation, and whose centre lies inside
    the object's box, are its positives. A point wanted by several objects goes to that with the
    highest IoU. Levels with fewer points give what they have.

    Args:
        boxes: (A, 4) XYXY, the box predicted at each anchor point; may be inverted.
        points_per_level: number of points of each level; they add up to A.
        gt_boxes: (G, 4) XYXY.
        valid: (A,) bool, points that may be assigned; None: all.
        topk: candidates per level.

    Returns:
        The assignment (A,), and the IoU of each assigned point with its object (A,), else 0.
    """
    num_points = len(boxes)
    if len(gt_boxes) == 0:
        assignment = boxes.new_full((num_points,), _NONE, dtype=torch.int64)
        return assignment, boxes.new_zeros(num_points)
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    gt_centers = (gt_boxes[:, :2] + gt_boxes[:, 2:]) / 2

    candidates, usable = _nearest_on_each_level(
        _places(centers, valid), points_per_level, gt_centers, topk
    )

    iou = pairwise_iou_inverted(boxes[candidates], gt_boxes[:, None])  # (G, candidates)
    number = usable.sum(dim=1, keepdim=True)
    mean = (iou * usable).sum(dim=1, keepdim=True) / number.clamp(min=1)
    variance = ((iou - mean).square() * usable).sum(dim=1, keepdim=True) / (number - 1).clamp(min=1)
    to_sides = torch.cat(
        [centers[candidates] - gt_boxes[:, None, :2], gt_boxes[:, None, 2:] - centers[candidates]],
        dim=2,
    )
    inside = to_sides.amin(dim=2) > _MARGIN
    positive = usable & inside & (iou >= mean + variance.sqrt())

    owners, column = torch.nonzero(positive, as_tuple=True)
    chosen, iou = candidates[owners, column], iou[owners, column]
    assignment = lowest_cost(num_points, chosen, owners, -iou)
    won = assignment[chosen] == owners
    quality = boxes.new_zeros(num_points)
    return assignment, quality.scatter_reduce(0, chosen, iou.masked_fill(~won, 0), "amax")


def has_inside(gt_boxes: Tensor) -> Tensor:
    """(G,) bool: whether :func:`assign_atss` can give an object positives.

    It cannot where the box (G, 4) XYXY has no inside: that around a single keypoint, or around
    several on an upright or level line.
    """
    return ((gt_boxes[:, 2:] - gt_boxes[:, :2]) > 2 * _MARGIN).all(dim=1)


def _places(points: Tensor, valid: Tensor | None) -> Tensor:
    """Points (A, 2), those that may not be assigned infinitely far away."""
    return points if valid is None else points.masked_fill(~valid[:, None], torch.inf)


def _nearest_on_each_level(
    places: Tensor, points_per_level: list[int], gt_centers: Tensor, topk: int
) -> tuple[Tensor, Tensor]:
    """Of each object the nearest points (G, candidates), level by level, and whether they may be
    assigned.

    Args:
        places: see :func:`_places`.
    """
    candidates, usable = [], []
    start = 0
    unit = torch.ones_like(gt_centers)
    for count in points_per_level:
        distance, nearest = _nearest(
            places[start : start + count], gt_centers, unit, min(topk, count)
        )
        candidates.append(nearest + start)
        usable.append(distance.isfinite())
        start += count
    return torch.cat(candidates, dim=1), torch.cat(usable, dim=1)


def _nearest(places: Tensor, centers: Tensor, units: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` points nearest to each centre, nearest first; of equally near ones any.

    On a CPU blocks of points are left out whose bounds are further away than what is found in
    others. Where that does not hold, all points are looked at.

    Args:
        places: (A, 2), some at infinity.
        centers: (G, 2).
        units: (G, 2), of length in x and y.

    Returns:
        Distances and indices (G, count).
    """
    blocks, looked_at = len(places) // _BLOCK, 2 * count
    if blocks <= 2 * looked_at or places.device.type != "cpu":  # to ask would be to wait
        return _nearest_of_all(places, centers, units, count)
    head, rest = places[: blocks * _BLOCK], places[blocks * _BLOCK :]
    head = head.unflatten(0, (blocks, _BLOCK))
    low, high = head.amin(dim=1), head.amax(dim=1)
    # A block with points at infinity ends with the others.
    high = torch.where(high.isinf(), head.masked_fill(head.isinf(), -torch.inf).amax(dim=1), high)
    within = torch.arange(_BLOCK, device=places.device)
    last = torch.arange(blocks * _BLOCK, len(places), device=places.device)
    distances, indices = [], []
    at_once = max(_DISTANCES_AT_ONCE // max(blocks, looked_at * _BLOCK + len(rest)), 1)
    for center, unit in zip(centers.split(at_once), units.split(at_once), strict=True):
        beyond = [
            torch.maximum(low[:, i] - center[:, i, None], center[:, i, None] - high[:, i])
            .clamp_(min=0)
            .div_(unit[:, i, None])
            for i in range(2)
        ]
        bound = beyond[0].square_().add_(beyond[1].square_())
        bound, chosen = bound.topk(looked_at + 1, dim=1, largest=False)
        columns = chosen[:, :-1, None] * _BLOCK + within
        columns = torch.cat([columns.flatten(1), last.expand(len(center), -1)], dim=1)
        distance = _distances(places[columns], center, unit)
        distance, index = distance.topk(count, dim=1, largest=False)
        index = columns.gather(1, index)
        # The bounds are rounded as well.
        missed = ~(distance[:, -1] < 0.999 * bound[:, -1].sqrt())
        if missed.any():
            distance[missed], index[missed] = _nearest_of_all(
                places, center[missed], unit[missed], count
            )
        distances.append(distance)
        indices.append(index)
    return torch.cat(distances), torch.cat(indices)


def _nearest_of_all(
    places: Tensor, centers: Tensor, units: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """See :func:`_nearest`; all distances are computed, some objects at a time."""
    at_once = max(_DISTANCES_AT_ONCE // len(places), 1)
    found = [
        _distances(places, center, unit).topk(count, dim=1, largest=False)
        for center, unit in zip(centers.split(at_once), units.split(at_once), strict=True)
    ]
    distances, indices = zip(*found, strict=True)
    return torch.cat(distances), torch.cat(indices)


def _distances(places: Tensor, centers: Tensor, units: Tensor) -> Tensor:
    """Of centres (G, 2) to points ([G,] N, 2), in units (G, 2): (G, N)."""
    x, y = (
        (places[..., i] - centers[:, i, None]).div_(units[:, i, None]).square_() for i in range(2)
    )
    return x.add_(y).sqrt_()


def stride_log2(stride: int) -> int:
    """Pyramid level of a stride; raises ValueError unless it is a power of two."""
    if stride < 1 or stride & (stride - 1):
        raise ValueError(f"strides must be powers of two, got {stride}")
    return stride.bit_length() - 1


def pairwise_iou_inverted(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of broadcast pairs of boxes (..., 4) XYXY, defined for inverted boxes as well.

    Detectron2's and torchvision's take proper boxes only. Here, as in the released code, areas
    carry the sign of width times height.
    """
    low = torch.maximum(boxes[..., :2], others[..., :2])
    high = torch.minimum(boxes[..., 2:], others[..., 2:])
    intersection = (high - low).clamp(min=0).prod(dim=-1)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)
    other_area = (others[..., 2:] - others[..., :2]).prod(dim=-1)
    return intersection / (area + other_area - intersection).clamp(min=_EPS_SIZE)


def lowest_cost(num_points: int, chosen: Tensor, owners: Tensor, costs: Tensor) -> Tensor:
    """Settle who gets each point: the claim of the lowest cost, then of the lowest object index.

    Independent of the order of the claims, hence the same on every device.

    Args:
        chosen, owners, costs: (M,) claims; infinite costs are no claims.
    """
    lowest = costs.new_full((num_points,), torch.inf)
    lowest = lowest.scatter_reduce(0, chosen, costs, "amin")
    wins = (costs == lowest[chosen]) & costs.isfinite()
    nobody = torch.iinfo(torch.int64).max
    assignment = torch.full((num_points,), nobody, dtype=torch.int64, device=costs.device)
    owners = owners.masked_fill(~wins, nobody)
    assignment = assignment.scatter_reduce(0, chosen, owners, "amin")
    return assignment.masked_fill(assignment == nobody, _NONE)

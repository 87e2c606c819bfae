"""What the maps of corner verification learn from the boxes of an image.

Letters: A anchor points of all levels together, L levels, G objects, K classes. Of a dimension of
two corners, index 0 is the top left and 1 the bottom right.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers.levels import flatten_levels
from .assigners import lowest_cost
from .points import AnchorPoints

_EPS = 1e-6


def corner_targets(
    points: AnchorPoints, boxes: Tensor, valid: Tensor, *, min_overlap: float = 0.7
) -> tuple[Tensor, Tensor]:
    """Heat maps and offsets.

    On every level, whatever the size of the object, the point nearest to a corner is 1, and around
    the corner the heat falls as a Gaussian, up to the radius of :func:`corner_radius`. Of two
    objects the hotter counts; where both are nearest to one point, the offset leads to the nearer
    corner (released code, point_hm_assigner: to that of the last object).

    Args:
        boxes: (G, 4) XYXY in image pixels.
        valid: (A,) bool, points that may be hot.
        min_overlap: IoU that a box keeps while its corners stay within the radius.

    Returns:
        heat (A, 2) in [0, 1]; offsets (A, 2, 2) as x, y from the point to the corner, in cells,
        zero where the heat is not 1.
    """
    num_points, num_objects = len(points.xy), len(boxes)
    corners = boxes.to(points.xy).view(num_objects, 2, 2)
    radius = corner_radius(corners[:, 1] - corners[:, 0], min_overlap)[:, None]
    sigma = (2 * radius + 1) / 6
    heat = points.xy.new_zeros(num_points, 2)
    offsets = points.xy.new_zeros(num_points, 2, 2)
    if num_objects == 0:
        return heat, offsets
    for corner, places in enumerate(corners.unbind(1)):
        distance = (points.xy - places[:, None]).norm(dim=2)  # (G, A)
        distance = distance.masked_fill(~valid, torch.inf)
        gaussian = torch.exp(-(distance**2) / (2 * sigma**2)) * (distance < radius)
        nearest, start = [], 0
        for level in distance.split(points.per_level, dim=1):
            nearest.append(level.argmin(dim=1) + start)
            start += level.shape[1]
        nearest = torch.stack(nearest, dim=1)  # (G, L)
        owners = torch.arange(num_objects, device=nearest.device)[:, None].expand_as(nearest)
        owner = lowest_cost(
            num_points, nearest.flatten(), owners.flatten(), distance.gather(1, nearest).flatten()
        )
        peaks = torch.nonzero(owner >= 0).squeeze(1)
        heat[:, corner] = gaussian.amax(dim=0).index_fill(0, peaks, 1)
        shift = places[owner[peaks]] - points.xy[peaks]
        offsets[peaks, corner] = shift / points.strides[peaks, None]
    return heat, offsets


def corner_radius(sizes: Tensor, min_overlap: float) -> Tensor:
    """How far both corners of a box may move while its IoU with the old one stays.

    The least of three cases: one corner moves inwards and the other outwards, both inwards, both
    outwards. Each is the smaller positive root of a r^2 - b r + c = 0 (CornerNet's published code
    leaves out a; the released LSNet and we do not).

    Args:
        sizes: (G, 2), width and height.
        min_overlap: the IoU.

    Returns:
        (G,), in the unit of the sizes.
    """
    total, area = sizes.sum(dim=1), sizes.prod(dim=1)
    lost = 1 - min_overlap
    roots = []
    for a, b, c in (
        (1, total, area * lost / (1 + min_overlap)),
        (4, 2 * total, area * lost),
        (4 * min_overlap, -2 * min_overlap * total, -area * lost),
    ):
        # 2 c / (b + sqrt(...)), for negative b and c likewise
        root = 2 * c.abs() / (b.abs() + (b**2 - 4 * a * c).sqrt()).clamp(min=_EPS)
        roots.append(root)
    return torch.stack(roots, dim=1).amin(dim=1)


def semantic_targets(
    points: AnchorPoints, boxes: Tensor, classes: Tensor, valid: Tensor, num_classes: int
) -> Tensor:
    """Which classes a cell belongs to, and how much that counts.

    On the finest level every cell that a box touches belongs to its class and counts 1 / area of
    the box, of several boxes the smallest; coarser levels take the nearest cell of it.

    Args:
        boxes: (G, 4) XYXY in image pixels.
        classes: (G,).
        valid: (A,) bool, points of the image.
        num_classes: K.

    Returns:
        (A, K), 0 where a cell does not belong to a class.
    """
    height, width = points.sizes[0]
    count = points.per_level[0]
    stride = points.strides[0]
    # The anchor point is the top left of its cell.
    cells = (points.xy[:count] / stride).view(1, count, 2)
    low, high = (boxes.to(points.xy) / stride).floor()[:, None].split(2, dim=2)
    covered = ((cells >= low) & (cells <= high)).all(dim=2) & valid[:count]
    area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).clamp(min=_EPS)
    weights = (covered / area[:, None]).to(points.xy.dtype)  # (G, count)
    finest = weights.new_zeros(num_classes, count)
    finest.scatter_reduce_(0, classes[:, None].expand_as(weights), weights, "amax")
    finest = finest.view(1, num_classes, height, width)
    levels = [F.interpolate(finest, size=size, mode="nearest") for size in points.sizes]
    return flatten_levels(levels)[0]

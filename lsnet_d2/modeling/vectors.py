"""Landmark vectors: displacements written as four non-negative components.

A displacement (dx, dy), y pointing down, is written as ``[up, down, left, right]``. This order is
the channel order of every landmark prediction. Of each pair the side that the vector points to
carries its length; the other side is trained towards ``alpha`` times it (paper, section 3.2).

Letters: V vectors, ``...`` any leading dimensions.
"""

import torch
from torch import Tensor

COMPONENTS = 4


def encode_vectors(displacements: Tensor, alpha: float = 0.2) -> Tensor:
    """Training target of each displacement.

    Args:
        displacements: (..., 2) as x, y; zero counts as right or down.
        alpha: length of the side that the vector does not point to, relative to the other's.

    Returns:
        (..., 4) as up, down, left, right.
    """
    length = displacements.abs()
    opposite = alpha * length
    forward = displacements >= 0
    negative_side = torch.where(forward, opposite, length)
    positive_side = torch.where(forward, length, opposite)
    left, up = negative_side.unbind(-1)
    right, down = positive_side.unbind(-1)
    return torch.stack([up, down, left, right], dim=-1)


def decode_vectors(components: Tensor) -> Tensor:
    """The displacement that a prediction stands for: the larger side of each pair.

    Args:
        components: (..., 4) as up, down, left, right. Ties go up and left.

    Returns:
        (..., 2) as x, y. The gradient reaches the larger side only.
    """
    up, down, left, right = components.unbind(-1)
    dx = torch.where(right > left, right, -left)
    dy = torch.where(down > up, down, -up)
    return torch.stack([dx, dy], dim=-1)

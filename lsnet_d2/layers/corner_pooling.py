"""Corner pooling (CornerNet, arXiv 1808.01244), in plain torch on any device."""

from torch import Tensor

# Towards which side the largest values move: the dimension, and whether against its order.
_SIDES = {"top": (-2, True), "left": (-1, True), "bottom": (-2, False), "right": (-1, False)}


def corner_pool(features: Tensor, side: str) -> Tensor:
    """Let the largest values move to one side of the map.

    A corner lies where an object is not: with "top" a cell sees the largest value of its column
    from itself down, with "left" that of its row from itself to the right, and so on.

    Args:
        features: (..., H, W).
        side: "top", "left", "bottom" or "right".

    Returns:
        (..., H, W). The gradient reaches the cells of the largest values; of equal ones, one.
    """
    dim, against = _SIDES[side]
    if not against:
        return features.cummax(dim).values
    return features.flip(dim).cummax(dim).values.flip(dim)

"""Maps of several pyramid levels as one list of points, and what follows from their sizes.

Shapes: B images, L levels, A points of all levels together, level by level and row-major, C
channels.
"""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def flatten_levels(features: list[Tensor]) -> Tensor:
    """Maps (B, C, H, W) of all levels to (B, A, C)."""
    return torch.cat([f.permute(0, 2, 3, 1).flatten(1, 2) for f in features], dim=1)


def unflatten_levels(flat: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
    """The inverse of :func:`flatten_levels`; maps in channels-last memory order."""
    levels = flat.split([h * w for h, w in sizes], dim=1)
    return [
        level.unflatten(1, size).permute(0, 3, 1, 2)
        for level, size in zip(levels, sizes, strict=True)
    ]


def expand_levels(values: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
    """What holds for a level (L, ...), for each of its points (A, ...)."""
    levels = zip(values, sizes, strict=True)
    return torch.cat([value.expand(h * w, *value.shape) for value, (h, w) in levels])


def kept_by_size(make: Callable[..., T]) -> Callable[..., T]:
    """Keep what follows from the sizes of maps alone, of the last few. All arguments must be
    hashable."""
    # Made at test time, it may be used in training. What is kept for a large image takes 10 MB.
    kept = lru_cache(maxsize=16)(torch.inference_mode(False)(make))

    @wraps(make)
    def find(*args):
        # When a model is exported, sizes are symbols, which cannot be keys.
        return (make if torch.compiler.is_exporting() else kept)(*args)

    return find

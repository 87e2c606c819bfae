"""Training examples on their way from a worker of the data loader.

torch hands over each tensor by a file descriptor, which a thread of the worker sends when it is
asked to, and that may wait for the mapper each time. An example has several small tensors, besides
its image; here they make one.
"""

import io
import pickle
from typing import Any

import torch
from torch import Tensor

# All that numpy has too, other than complex ones.
_DTYPES = {
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.float32, torch.float64),
}


class _Pickler(pickle.Pickler):
    """Takes plain tensors as arrays of numpy, which is faster and leaves out what a view is part
    of; others as they do it themselves."""

    def reducer_override(self, value: Any) -> Any:
        plain = type(value) is Tensor and value.layout is torch.strided and value.is_cpu
        if plain and value.dtype in _DTYPES and not value.requires_grad:
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


def pack(example: dict) -> Tensor:
    """An example as one tensor (n,) uint8. Views of one tensor no longer share their memory."""
    piece = io.BytesIO()
    _Pickler(piece, protocol=5).dump(example)
    return torch.frombuffer(piece.getbuffer(), dtype=torch.uint8)


def unpack(piece: Tensor) -> dict:
    """What :func:`pack` was given. Not for data from elsewhere: it is a pickle."""
    return pickle.loads(piece.numpy())

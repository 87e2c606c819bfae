"""What the workers of a distributed training have to agree on."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor

_apart = ContextVar("_apart", default=False)


@contextmanager
def workers_apart() -> Iterator[None]:
    """Here :func:`mean_over_workers` gives each worker its own values."""
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


def mean_over_workers(values: Tensor) -> Tensor:
    """The mean of each value over all workers; in a single process, the values themselves."""
    workers = comm.get_world_size()
    if workers == 1 or _apart.get():
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / workers

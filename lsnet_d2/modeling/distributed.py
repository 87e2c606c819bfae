"""What the workers of a distributed training have to agree on."""

import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor


def mean_over_workers(values: Tensor) -> Tensor:
    """The mean of each value over all workers; in a single process, the values themselves."""
    workers = comm.get_world_size()
    if workers == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / workers

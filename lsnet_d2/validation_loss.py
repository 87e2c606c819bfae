"""The losses of a training, of images that it does not learn from."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, DatasetMapper, MapDataset
from detectron2.data import detection_utils as utils
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from torch.utils.data import DataLoader

from .modeling.distributed import workers_apart
from .seeding import VALIDATION, seeded_by

# Layers that behave differently in training, and not because of the loss.
_AS_IN_INFERENCE = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,  # Detectron2's derive from it
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)


def validation_mapper(mapper_class: type[DatasetMapper], cfg: CfgNode) -> DatasetMapper:
    """The mapper of the training, with the augmentation of the test: resizing."""
    arguments = mapper_class.from_config(cfg, is_train=True)
    arguments["augmentations"] = utils.build_augmentation(cfg, is_train=False)
    return mapper_class(**arguments)


class ValidationLoader:
    """Batches of all images, as many for each process, with what they count.

    Args of the constructor:
        records: dataset dicts.
        batch_size: of each process.
    """

    def __init__(
        self, records: Sequence[dict], mapper: DatasetMapper, *, batch_size: int, num_workers: int
    ) -> None:
        world, rank = comm.get_world_size(), comm.get_rank()
        mine = range(rank, len(records), world)
        count = math.ceil(math.ceil(len(records) / world) / batch_size)
        batches = [list(mine[i * batch_size : (i + 1) * batch_size]) for i in range(count)]
        # A model may exchange something: a process without images computes losses for nothing.
        self._weights = [len(batch) for batch in batches]
        self._loader = DataLoader(
            MapDataset(DatasetFromList(list(records), copy=False), mapper),
            batch_sampler=[batch or [0] for batch in batches],
            num_workers=num_workers,
            collate_fn=list,
        )

    def __iter__(self) -> Iterator[tuple[list[dict], int]]:
        return zip(self._loader, self._weights, strict=True)


def validation_losses(
    model: nn.Module, batches: Iterable[tuple[list[dict], int]], seed: int
) -> dict[str, float]:
    """Means over all images of all processes, in every process, and their "total_loss".

    The model is as it was afterwards: no gradient, no statistics of batch norm, no random numbers
    of the CPU and of its device are touched. Batch norm and dropout are as in inference.

    Args:
        model: gives losses by name in training; not wrapped.
        batches: mapped images, and how many of them count.
        seed: of what the losses choose at random.
    """
    sums, images = defaultdict(float), 0
    device = next(model.parameters()).device
    seeded = seeded_by(seed, VALIDATION, device=device)
    # Detectron2's models draw the images of every VIS_PERIOD-th iteration, and so of the 0th.
    # A batch that is not full, or does not count, must not weigh in the losses of others.
    with torch.no_grad(), _computing_losses(model), EventStorage(1), seeded, workers_apart():
        normalizers = loss_normalizers(model)
        for batch, weight in batches:
            for name, loss in model(batch).items():
                sums[name] += loss.item() * weight
            images += weight
            set_loss_normalizers(model, normalizers)
    gathered = comm.all_gather((dict(sums), images))
    total = sum(number for _, number in gathered)
    names = gathered[0][0]
    means = {name: sum(found[name] for found, _ in gathered) / total for name in names}
    return {"total_loss": sum(means.values()), **means}


@contextmanager
def _computing_losses(model: nn.Module) -> Iterator[None]:
    before = {module: module.training for module in model.modules()}
    model.train()
    for module in model.modules():
        if isinstance(module, _AS_IN_INFERENCE):
            module.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def loss_normalizers(model: nn.Module) -> dict[str, float]:
    """The running means by which Detectron2's dense detectors divide their losses. They are neither
    parameters nor buffers."""
    found = {
        name: getattr(module, "loss_normalizer", None) for name, module in model.named_modules()
    }
    return {name: float(n) for name, n in found.items() if isinstance(n, (int, float))}


def set_loss_normalizers(model: nn.Module, normalizers: dict[str, float]) -> None:
    """What :func:`loss_normalizers` has found in this model, or in another one like it."""
    modules = dict(model.named_modules())
    for name, value in normalizers.items():
        modules[name].loss_normalizer = value

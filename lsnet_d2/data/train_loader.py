"""The stream of training images, of which any part can be made anew."""

import itertools
import math
import random
import signal
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import ConfigError, DeadWorkerError, one_line
from ..seeding import AUGMENTATION, ORDER, seeded_by
from .images import read_image_size
from .serialization import pack, unpack

Mapper = Callable[[dict], dict | None]

# Of DATALOADER.SAMPLER_TRAIN, Detectron2's.
SAMPLERS = (
    "TrainingSampler",
    "RepeatFactorTrainingSampler",
    "RandomSubsetTrainingSampler",
    "WeightedTrainingSampler",
    "WeightedCategoryTrainingSampler",
)
_BATCHES_READY = 2
_MAX_TRIES = 100  # other images for one of which the mapper makes nothing


class TrainingLoader:
    """Batches of mapped images without end, as Detectron2's training loader gives them.

    The order is that of Detectron2's samplers, and with ``group_by_orientation`` images that are
    wider than high have batches of their own. What differs: every image has a number in the stream,
    the random numbers of its augmentation depend on the seed and this number alone, and batches are
    made up before images are read. So the stream is the same for any number of workers, and can
    start at any batch without reading what came before.

    Attributes:
        seed: of order and augmentation.
        batches_done: where the stream starts, counted in batches of this process.
    """

    def __init__(
        self,
        records: Sequence[dict],
        mapper: Mapper,
        make_sampler: Callable[[int], Sampler],
        *,
        batch_size: int,
        seed: int,
        group_by_orientation: bool = True,
        num_workers: int = 0,
    ) -> None:
        """
        Args:
            records: dataset dicts. Those without width and height cost a look at the image file.
            mapper: makes a training example of a copy of one; None means to take another image.
            make_sampler: from a seed to an endless sampler of the indices of this process, one of
                Detectron2's.
            batch_size: of this process.
        """
        self.batch_size = batch_size
        self.seed = seed
        self.batches_done = 0
        self._make_sampler = make_sampler
        self._num_workers = num_workers
        self._wide = np.array([_is_wide(r) for r in records]) if group_by_orientation else None
        self._records = DatasetFromList(records, copy=False)
        self._mapper = mapper

    def __iter__(self) -> Iterator[list[dict]]:
        """
        Raises:
            DeadWorkerError: an image could not be received. (torch notices most deaths of workers,
                anywhere in the main process, and raises a RuntimeError.)
        """
        stream = GroupedStream(
            self._make_sampler(self.seed), self.batch_size, self._wide, skip=self.batches_done
        )
        examples = DataLoader(
            SeededExamples(self._records, self._mapper, self.seed),
            sampler=stream,
            batch_size=None,  # of the workers each takes one image at a time
            num_workers=self._num_workers,
            prefetch_factor=self._prefetched(),
            collate_fn=pack,
            worker_init_fn=_ignore_interrupts,
            generator=torch.Generator(),  # otherwise it draws from the global one
        )
        examples = iter(examples)
        while True:
            try:
                batch = list(itertools.islice(examples, self.batch_size))
            except (ConnectionError, EOFError) as error:
                if not self._num_workers or str(error).startswith("Caught "):  # of the mapper
                    raise
                raise DeadWorkerError(one_line(error) or type(error).__name__) from error
            yield [unpack(example) for example in batch]

    def _prefetched(self) -> int | None:
        """Images that each worker has ready: at least two, and all together ``_BATCHES_READY``
        batches. torch's two alone are meant for workers that make whole batches.
        """
        if not self._num_workers:
            return None
        return max(math.ceil(_BATCHES_READY * self.batch_size / self._num_workers), 2)

    def state_dict(self, batches_done: int) -> dict[str, int]:
        """
        Args:
            batches_done: since the start of the training; workers may have read more.
        """
        return {"seed": self.seed, "images": batches_done * self.batch_size * comm.get_world_size()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the images of ``state``. With another size of the batch, or another number of
        processes, some are left out or come twice."""
        self.seed = state["seed"]
        self.batches_done = state["images"] // (self.batch_size * comm.get_world_size())


class GroupedStream(Sampler):
    """Numbers and indices of images, in such an order that each run of ``batch_size`` is a batch.

    The batches are those of Detectron2's ``AspectRatioGroupedDataset``: an image waits until there
    are enough of its orientation.
    """

    def __init__(
        self,
        sampler: Sampler,
        batch_size: int,
        wide: np.ndarray | None = None,
        *,
        skip: int = 0,
    ) -> None:
        """
        Args:
            sampler: gives the indices of this process without end.
            wide: bool, of each image; None: batches in the order of the sampler.
            skip: batches to leave out.
        """
        self._sampler = sampler
        self._batch_size = batch_size
        self._wide = wide
        self._skip = skip

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Pairs of a number, by which no other image of any process goes, and an index."""
        for batch in itertools.islice(self._batches(), self._skip, None):
            yield from batch

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        waiting: dict[bool, list] = {True: [], False: []}
        numbers = itertools.count(comm.get_rank(), comm.get_world_size())
        for number, index in zip(numbers, self._sampler, strict=False):
            group = bool(self._wide[index]) if self._wide is not None else True
            waiting[group].append((number, index))
            if len(waiting[group]) == self._batch_size:
                yield waiting[group]
                waiting[group] = []


class SeededExamples(Dataset):
    """Examples by the pairs of :class:`GroupedStream`."""

    def __init__(self, records: Dataset, mapper: Mapper, seed: int) -> None:
        self._records = records
        self._mapper = mapper
        self._seed = seed

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, place: tuple[int, int]) -> dict:
        number, index = place
        with seeded_by(self._seed, AUGMENTATION, number):
            for _ in range(_MAX_TRIES):
                example = self._mapper(self._records[index])
                if example is not None:
                    return example
                index = random.randrange(len(self._records))
        raise RuntimeError(f"the mapper made nothing of {_MAX_TRIES} images")


def sampler_maker(cfg: CfgNode, records: Sequence[dict]) -> Callable[[int], Sampler]:
    """From a seed to the sampler of ``DATALOADER.SAMPLER_TRAIN``.

    Raises:
        ConfigError: the sampler is unknown.
    """
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name == "TrainingSampler":
        return lambda seed: TrainingSampler(len(records), seed=seed)
    if name == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        )
        return lambda seed: RepeatFactorTrainingSampler(factors, seed=seed)
    if name == "RandomSubsetTrainingSampler":
        ratio = cfg.DATALOADER.RANDOM_SUBSET_RATIO
        return lambda seed: RandomSubsetTrainingSampler(
            len(records), ratio, seed_shuffle=seed, seed_subset=seed
        )
    if name in ("WeightedTrainingSampler", "WeightedCategoryTrainingSampler"):
        return _weighted_sampler_maker(cfg, records, by_category="Category" in name)
    raise ConfigError(
        f"DATALOADER.SAMPLER_TRAIN is {name!r}; it must be one of {', '.join(SAMPLERS)}"
    )


def _weighted_sampler_maker(
    cfg: CfgNode, records: Sequence[dict], by_category: bool
) -> Callable[[int], Sampler]:
    # Detectron2 has no public name for it. It loads the data sets anew, and draws its own seed.
    from detectron2.data.build import _build_weighted_sampler

    if cfg.DATASETS.INVALID_ANNOTATIONS == "drop":
        raise ConfigError(
            "DATALOADER.SAMPLER_TRAIN is a weighted one, which knows nothing of annotations that "
            "are dropped: DATASETS.INVALID_ANNOTATIONS must be 'error'"
        )

    def make(seed: int) -> Sampler:
        with seeded_by(seed, ORDER):
            return _build_weighted_sampler(cfg, enable_category_balance=by_category)

    return make


def _is_wide(record: dict) -> bool:
    if "width" in record and "height" in record:
        return record["width"] > record["height"]
    height, width = read_image_size(record["file_name"])
    return width > height


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches all processes; the main one ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

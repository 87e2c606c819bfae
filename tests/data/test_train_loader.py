import itertools
import multiprocessing
import time

import numpy as np
import pytest
import torch
from detectron2.data import MapDataset
from detectron2.data.build import build_batch_data_loader
from detectron2.data.common import DatasetFromList
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from PIL import Image
from tiny_model import tiny_cfg

from lsnet_d2.data.train_loader import TrainingLoader, sampler_maker
from lsnet_d2.errors import ConfigError, DeadWorkerError
from lsnet_d2.seeding import seed_by

SIZES = [(64, 48), (48, 64), (64, 64), (80, 48), (30, 64), (64, 48), (90, 20)]  # width, height


def records():
    return [{"index": i, "width": w, "height": h} for i, (w, h) in enumerate(SIZES)]


class Mapper:
    """Adds what the augmentation would draw."""

    def __init__(self, refused=()):
        self.refused = refused

    def __call__(self, record):
        if record["index"] in self.refused:
            return None
        return {**record, "drawn": (np.random.uniform(), torch.rand(1).item())}  # noqa: NPY002


def make(num_workers=0, seed=3, batch_size=2, mapper=None, grouped=True):
    return TrainingLoader(
        records(),
        mapper or Mapper(),
        lambda seed: TrainingSampler(len(SIZES), seed=seed),
        batch_size=batch_size,
        seed=seed,
        group_by_orientation=grouped,
        num_workers=num_workers,
    )


def first(loader, count):
    return list(itertools.islice(loader, count))


def indices(batches):
    return [[example["index"] for example in batch] for batch in batches]


@pytest.mark.parametrize("grouped", [True, False])
def test_batches_are_detectron2s(grouped):
    theirs = build_batch_data_loader(
        MapDataset(DatasetFromList(records()), dict),
        TrainingSampler(len(SIZES), seed=3),
        total_batch_size=2,
        aspect_ratio_grouping=grouped,
    )
    ours = first(make(grouped=grouped), 40)
    assert indices(ours) == indices(first(theirs, 40))
    wide = [[example["width"] > example["height"] for example in batch] for batch in ours]
    assert all(len(set(batch)) == 1 for batch in wide) == grouped


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(num_workers):
    assert first(make(num_workers), 12) == first(make(), 12)


@pytest.mark.parametrize(
    ("num_workers", "batch_size", "count"),
    [(1, 6, 18), (2, 6, 18), (4, 2, 10)],
    ids=["one", "two", "one for each two images"],
)
def test_workers_have_two_batches_ready(num_workers, batch_size, count):
    mapped = multiprocessing.Value("i")

    class Counting(Mapper):
        def __call__(self, record):
            with mapped.get_lock():
                mapped.value += 1
            return super().__call__(record)

    batches = iter(make(num_workers, batch_size=batch_size, mapper=Counting()))
    next(batches)
    wait = time.monotonic() + 20
    while mapped.value < count and time.monotonic() < wait:
        time.sleep(0.01)
    time.sleep(0.2)  # to see that it ends there
    assert mapped.value == count


def test_the_stream_starts_anywhere():
    whole = first(make(), 30)
    for done in (1, 7, 20):
        loader = make(seed=99)
        loader.load_state_dict(make().state_dict(done))
        assert first(loader, 10) == whole[done : done + 10]
    # the same images in batches of another size: as many are passed over
    loader = make(batch_size=1)
    loader.load_state_dict(make().state_dict(3))
    assert loader.batches_done == 6


def test_the_place_in_the_stream_counts_all_processes(monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    state = make().state_dict(3)
    assert state["images"] == 12
    loader = make()
    loader.load_state_dict(state)
    assert loader.batches_done == 3
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 1)
    loader.load_state_dict(state)
    assert loader.batches_done == 6


def test_each_image_has_numbers_of_its_own():
    drawn = [example["drawn"] for batch in first(make(), 30) for example in batch]
    assert len(set(drawn)) == 60
    assert len({numpy for numpy, _ in drawn}) == len({torch for _, torch in drawn}) == 60
    assert not set(drawn) & {e["drawn"] for batch in first(make(seed=4), 30) for e in batch}


def test_processes_share_the_stream(monkeypatch):
    whole = [e for batch in first(make(batch_size=1, grouped=False), 12) for e in batch]
    found = []
    for rank in (0, 1):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
        found.append([e for b in first(make(batch_size=1, grouped=False), 6) for e in b])
    assert [e for pair in zip(*found, strict=True) for e in pair] == whole


def test_loading_leaves_the_random_numbers_of_the_model_alone():
    seed_by(1)
    expected = torch.rand(3), np.random.uniform()  # noqa: NPY002
    seed_by(1)
    first(make(), 5)
    assert torch.equal(torch.rand(3), expected[0])
    assert np.random.uniform() == expected[1]  # noqa: NPY002


def test_what_the_mapper_refuses_is_replaced():
    whole = first(make(), 20)
    batches = first(make(mapper=Mapper(refused=(0, 3))), 20)
    kept = [e["index"] for batch in batches for e in batch]
    assert not {0, 3} & set(kept) and len(kept) == 40
    assert batches == first(make(2, mapper=Mapper(refused=(0, 3))), 20)
    for before, after in zip(sum(whole, []), sum(batches, []), strict=True):
        assert before["index"] in (0, 3) or before["index"] == after["index"]
    with pytest.raises(RuntimeError, match="made nothing"):
        first(make(mapper=Mapper(refused=range(len(SIZES)))), 1)


def test_images_of_a_worker_that_is_gone(monkeypatch):
    class Gone:
        def __init__(self, *_, **__):
            pass

        def __iter__(self):
            return self

        def __next__(self):
            raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr("lsnet_d2.data.train_loader.DataLoader", Gone)
    with pytest.raises(DeadWorkerError, match="has ended .*Connection reset by peer.*NUM_WORKERS"):
        first(make(2), 1)
    with pytest.raises(ConnectionResetError):  # there is no worker
        first(make(0), 1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_of_the_mapper_are_its_own(num_workers):
    def mapper(record):
        raise EOFError("no data left in file")

    with pytest.raises(EOFError, match="no data left"):
        first(make(num_workers, mapper=mapper), 1)


def test_sizes_are_read_where_the_records_have_none(tmp_path):
    files = []
    for number, size in enumerate(SIZES):
        files.append({"index": number, "file_name": str(tmp_path / f"{number}.png")})
        Image.new("RGB", size).save(files[-1]["file_name"])
    loader = TrainingLoader(
        files,
        Mapper(),
        lambda seed: TrainingSampler(len(SIZES), seed=seed),
        batch_size=2,
        seed=3,
    )
    assert indices(first(loader, 20)) == indices(first(make(), 20))


def test_samplers():
    cfg = tiny_cfg()
    data = [{"annotations": [{"category_id": int(i == 0)}]} for i in range(8)]
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.5
    for name in ("TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler"):
        cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATALOADER.RANDOM_SUBSET_RATIO = name, 0.5
        make = sampler_maker(cfg, data)
        one, again, other = (list(itertools.islice(make(seed), 40)) for seed in (1, 1, 2))
        assert one == again != other
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(data, 0.5)
    theirs = RepeatFactorTrainingSampler(factors, seed=5)
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    ours = sampler_maker(cfg, data)(5)
    assert list(itertools.islice(ours, 50)) == list(itertools.islice(theirs, 50))
    cfg.DATALOADER.SAMPLER_TRAIN = "Nope"
    with pytest.raises(ConfigError, match="SAMPLER_TRAIN is 'Nope'; .*RepeatFactor"):
        sampler_maker(cfg, data)

import random

import numpy as np
import pytest
import torch
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.utils.events import EventStorage, get_event_storage
from tiny_model import make_input, tiny_model
from tiny_training import make_cfg, write_data
from torch import nn

from lsnet_d2.data.dataset_mapper import LSNetDatasetMapper
from lsnet_d2.loaders import load_training_data
from lsnet_d2.validation_loss import ValidationLoader, validation_losses, validation_mapper

BATCH = [make_input([[10, 12, 60, 70], [70, 20, 120, 90]], [0, 1], seed=1)]
OTHER = [make_input([[30, 40, 44, 60]], [2], seed=2)]


def test_means_are_of_images():
    model = tiny_model().train()
    with EventStorage():
        losses = [{k: v.item() for k, v in model(batch).items()} for batch in (BATCH, OTHER)]
    found = validation_losses(model, [(BATCH, 3), (OTHER, 1)], 0)
    for name, value in found.items():
        expected = [sum(x.values()) if name == "total_loss" else x[name] for x in losses]
        assert value == pytest.approx((3 * expected[0] + expected[1]) / 4)
    assert len(found) == 1 + len(losses[0])


class Noisy(nn.Module):
    """Has batch norm and dropout, and keeps a running mean as Detectron2's dense detectors do."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(3), NaiveSyncBatchNorm(3)])
        self.dropout = nn.Dropout(0.5)
        self.loss_normalizer = 10.0

    def forward(self, batch):
        assert self.training
        self.loss_normalizer += 1
        x = torch.stack([image["image"].float() for image in batch])
        for norm in self.norms:
            x = norm(x)
        return {"loss": self.dropout(x).mean() / self.loss_normalizer + torch.rand(())}


class Drawing(nn.Linear):
    """Draws images as Detectron2's models with a VIS_PERIOD do."""

    def forward(self, batch):
        storage = get_event_storage()
        for period in (2, 20):
            assert storage.iter % period
        return {"loss": self.weight.sum()}


def test_nothing_is_drawn():
    validation_losses(Drawing(1, 1), [(BATCH, 1), (OTHER, 1)], 0)


def test_nothing_is_touched():
    model = Noisy().eval()
    model.norms[0].train()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
    first = validation_losses(model, [(BATCH, 1), (OTHER, 1)], 5)
    assert first == validation_losses(model, [(BATCH, 1), (OTHER, 1)], 5)
    assert first != validation_losses(model, [(BATCH, 1), (OTHER, 1)], 6)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[2]
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert model.loss_normalizer == 10
    assert [module.training for module in model.modules()] == modes
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


def test_processes_have_as_many_batches(monkeypatch):
    seen = []
    for rank in range(4):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 4)
        loader = ValidationLoader(range(5), int, batch_size=1, num_workers=0)
        batches = list(loader)
        assert len(batches) == 2
        seen += [image for batch, weight in batches if weight for image in batch]
        assert all(weight in (0, len(batch)) for batch, weight in batches)
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_images_are_as_in_the_test(tmp_path):
    cfg = make_cfg(write_data(tmp_path), tmp_path / "output")
    cfg.INPUT.MIN_SIZE_TEST = 96
    mapper = validation_mapper(LSNetDatasetMapper, cfg)
    record = load_training_data(cfg)[0]
    first, second = mapper(record), mapper(record)
    assert first["image"].shape == (3, 96, 128) and torch.equal(first["image"], second["image"])
    box = torch.tensor(record["annotations"][0]["bbox"]) * 2
    box[2:] += box[:2]
    assert torch.equal(first["instances"].gt_boxes.tensor[0], box.float())

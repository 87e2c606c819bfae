"""A training that is interrupted at any moment ends with the weights of one that is not."""

import multiprocessing
import os
import shutil
import signal

import pytest
import torch
from tiny_training import PERIOD, At, make_cfg, train, write_data

from lsnet_d2.description import KEY as DESCRIPTION_KEY
from lsnet_d2.engine import LSNetTrainer
from lsnet_d2.errors import CheckpointError


def killed(cfg, iteration):
    """Train in a process that is killed before this iteration."""

    def work():
        train(cfg, At(iteration, lambda: os.kill(os.getpid(), signal.SIGKILL)))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def final(folder):
    """What the training left, but for its config, which names the folder."""
    checkpoint = torch.load(folder / "model_final.pth", weights_only=True)
    checkpoint.pop(DESCRIPTION_KEY)
    return checkpoint


def assert_equal(first, second):
    """Two nested structures of tensors and numbers are the same to the last bit."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert_equal(a, b)
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def uninterrupted(folder):
    output = folder / "whole"
    train(make_cfg(folder, output))
    trained = final(output)["average"]["trained"]
    before = torch.load(output / "model_0000005.pth")["average"]["trained"]
    name = "backbone.bottom_up.stem.conv1.weight"
    assert not torch.equal(before[name], trained[name])  # an iteration makes a difference
    return final(output)


@pytest.mark.parametrize(("workers", "iteration"), [(0, 4), (1, 6), (2, 5)])
def test_killed_training_ends_with_the_same_weights(
    folder, uninterrupted, tmp_path, workers, iteration
):
    """The first is killed between checkpoints, the second right after one."""
    cfg = make_cfg(folder, tmp_path, **{"DATALOADER.NUM_WORKERS": workers})
    killed(cfg, iteration)
    assert not (tmp_path / "model_final.pth").exists()
    trainer = train(cfg, resume=True)
    assert trainer.start_iter == iteration // PERIOD * PERIOD
    assert_equal(final(tmp_path), uninterrupted)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("RetinaNet", {"SEED": -1, "SOLVER.EMA.ENABLED": False}),
        (
            "LSNet",
            {
                "SEED": -1,
                "SOLVER.ACCUMULATION_STEPS": 2,
                "DATALOADER.SAMPLER_TRAIN": "RepeatFactorTrainingSampler",
                "DATALOADER.REPEAT_THRESHOLD": 0.8,
                "SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR",
                "TEST.BEST_METRIC": "validation/total_loss",
                "TEST.BEST_MODE": "min",
            },
        ),
    ],
)
def test_a_drawn_seed_is_kept(folder, tmp_path, architecture, settings):
    whole, part = tmp_path / "whole", tmp_path / "part"
    cfg = make_cfg(folder, whole, architecture=architecture, **settings)
    first = train(cfg)
    part.mkdir()
    shutil.copy(whole / "model_0000002.pth", part)
    cfg = make_cfg(folder, part, architecture=architecture, **settings)
    second = train(cfg, resume=True)
    assert second.start_iter == 3 and second.seed == first.seed
    assert_equal(final(part), final(whole))


def test_an_average_starts_with_the_loaded_weights(folder, tmp_path):
    """Also where no iteration follows, and only the evaluation."""
    cfg = make_cfg(folder, tmp_path, **{"SOLVER.MAX_ITER": 1, "SOLVER.EMA.ENABLED": False})
    cfg.TEST.VALIDATION_LOSS = False
    trained = train(cfg).model.state_dict()
    cfg.SOLVER.EMA.ENABLED = True
    assert_equal(dict(train(cfg, resume=True).evaluated_model.state_dict()), dict(trained))
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = str(tmp_path / "model_final.pth"), str(tmp_path / "new")
    trainer = LSNetTrainer(cfg)
    trainer.resume_or_load(resume=False)
    assert_equal(dict(trainer.evaluated_model.state_dict()), dict(trained))


def test_normalizers_of_several_processes_have_the_names_of_one(folder, tmp_path):
    cfg = make_cfg(folder, tmp_path, architecture="RetinaNet")
    trainer = LSNetTrainer(cfg)
    model = trainer.model
    model.loss_normalizer = 5.0
    trainer.model = torch.nn.DataParallel(model)
    state = trainer.state_dict()
    assert state["loss_normalizers"] == {"": 5.0}
    model.loss_normalizer = 6.0
    trainer.load_state_dict(state)
    assert model.loss_normalizer == 5.0
    assert "loss_normalizer" not in vars(trainer.model)


def test_averaged_weights_are_not_gone_on_without(folder, tmp_path):
    cfg = make_cfg(folder, tmp_path, **{"SOLVER.MAX_ITER": 1})
    train(cfg)
    cfg = make_cfg(folder, tmp_path, **{"SOLVER.EMA.ENABLED": False})
    with pytest.raises(CheckpointError, match=r"model_final.pth is of .*SOLVER.EMA.ENABLED must"):
        train(cfg, resume=True)

"""Trainings that end before their last iteration."""

import json
import multiprocessing
import os
import resource
import signal

import pytest
import torch
from detectron2.engine import HookBase
from tiny_training import At, make_cfg, train, write_data

from lsnet_d2.checkpointer import LSNetCheckpointer
from lsnet_d2.errors import (
    CheckpointError,
    ConfigError,
    DeadWorkerError,
    NonFiniteLossError,
    NonFiniteWeightsError,
    TrainingError,
)
from lsnet_d2.stopping import StoppableTrainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def names(output):
    return sorted(path.name for path in output.glob("*model*"))


def rows(output):
    return [json.loads(row) for row in (output / "metrics.json").read_text().splitlines()]


def test_a_loss_that_is_not_finite_ends_the_training(folder, tmp_path, caplog):
    """In the last iteration, where Detectron2 would evaluate, and with a checkpoint due."""
    cfg = make_cfg(folder, tmp_path, **{"SOLVER.MAX_ITER": 3, "SOLVER.CHECKPOINT_PERIOD": 1})
    cfg.TEST.EVAL_PERIOD = 2
    holder = []

    def spoil():
        with torch.no_grad():
            holder[0].trainer.model.head.cls_predictor.out.bias.fill_(float("nan"))

    holder.append(At(2, spoil))
    with pytest.raises(NonFiniteLossError, match="iteration 2: loss_cls is nan") as error:
        train(cfg, *holder)
    assert len(error.value.file_names) == 2
    assert all(name.startswith(str(folder / "images")) for name in error.value.file_names)
    assert names(tmp_path) == ["model_0000000.pth", "model_0000001.pth"]
    assert "Traceback" not in caplog.text
    found = {row["iteration"]: row for row in rows(tmp_path)}
    assert "bbox/AP" in found[1] and "total_loss" not in found[2] and "bbox/AP" not in found[2]


def test_weights_that_are_not_finite_are_not_saved(folder, tmp_path):
    cfg = make_cfg(folder, tmp_path, **{"SOLVER.CHECKPOINT_PERIOD": 1, "SOLVER.MAX_ITER": 2})
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
    holder = []

    def overflow():
        holder[0].trainer.model.backbone.fpn_output3.weight.register_hook(lambda g: g * torch.inf)

    holder.append(At(1, overflow))
    message = r"iteration 1: the weight backbone.fpn_output3.weight is not finite"
    with pytest.raises(NonFiniteWeightsError, match=message):
        train(cfg, *holder)
    assert names(tmp_path) == ["model_0000000.pth"]


class Loop(StoppableTrainer):
    """One whose iterations do this, and whose hooks write down that they have ended."""

    def __init__(self, *actions, at_end=()):
        super().__init__()
        self.actions, self.ended = actions, []
        self.register_hooks([AtEnd(self.ended, action) for action in at_end])

    def run_step(self):
        self.actions[self.iter]()


class AtEnd(HookBase):
    def __init__(self, ended, action):
        self.ended, self.action = ended, action

    def after_train(self):
        last = self.trainer.iter + 1 >= self.trainer.max_iter  # as of Detectron2's evaluation
        self.ended.append((self.action, last))
        if last:
            self.action()


def fail(error):
    def action():
        raise error

    return action


def nothing():
    pass


def test_hooks_end_once():
    loop = Loop(nothing, nothing, at_end=[nothing, nothing])
    loop.train(0, 2)
    assert loop.ended == [(nothing, True)] * 2
    assert loop.storage.iter == loop.iter == 2


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failure_at_the_end(error):
    """Such as of the last evaluation: the hooks after it are closed, it is not tried again."""
    failing = fail(error)
    loop = Loop(nothing, nothing, at_end=[nothing, failing, nothing])
    expected = TrainingError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        loop.train(0, 2)
    assert loop.ended == [(nothing, True), (failing, True), (nothing, False)]
    if expected is TrainingError:
        assert str(caught.value) == "iteration 1: No space left on device"


def test_what_workers_report():
    dead = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. It is possible ...")
    with pytest.raises(TrainingError, match=r"^iteration 1: a process that loads .*\(.*Killed\)"):
        Loop(nothing, fail(dead)).train(0, 2)
    with pytest.raises(TrainingError, match=r"^iteration 0: a process that loads .*\(EOFError\)"):
        Loop(fail(DeadWorkerError("EOFError"))).train(0, 1)
    # errors of the mapper, and any others, keep their traceback
    text = "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback ..."
    for error in (RuntimeError(text), EOFError()):
        with pytest.raises(type(error)) as caught:
            Loop(fail(error)).train(0, 1)
        assert caught.value is error


def test_proposals_that_are_not_finite():
    text = "Predicted boxes or scores contain Inf/NaN. Training has diverged."
    with pytest.raises(TrainingError, match="iteration 1: Predicted .*diverged. A lower SOLVER.BA"):
        Loop(nothing, fail(FloatingPointError(text))).train(0, 2)
    with pytest.raises(FloatingPointError):
        Loop(fail(FloatingPointError("overflow"))).train(0, 1)


def test_full_disk(folder, tmp_path):
    cfg = make_cfg(folder, tmp_path, **{"SOLVER.CHECKPOINT_PERIOD": 2})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, limits[1]))

    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*_0000003.pth: File too large"):
            train(cfg, At(3, fill))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["model_0000001.pth"]
    assert train(cfg, resume=True).start_iter == 2
    assert "model_final.pth" in names(tmp_path)


def test_errors_of_the_disk_are_named(folder, tmp_path):
    def fail():
        raise OSError(28, "No space left on device", "metrics.json")

    message = "iteration 1: metrics.json: No space left on device"
    with pytest.raises(TrainingError, match=message):
        train(make_cfg(folder, tmp_path), At(1, fail))


def test_dead_worker(folder, tmp_path):
    def kill():
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)

    cfg = make_cfg(folder, tmp_path, **{"DATALOADER.NUM_WORKERS": 1, "SOLVER.MAX_ITER": 200})
    cfg.TEST.EVAL_PERIOD = 0
    with pytest.raises(TrainingError, match="a process that loads images has ended .*--resume"):
        train(cfg, At(4, kill))
    assert names(tmp_path) == ["model_0000002.pth"]


def test_interruption_is_passed_on(folder, tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(make_cfg(folder, tmp_path), At(6, interrupt))
    assert names(tmp_path) == ["model_0000002.pth", "model_0000005.pth"]


# --- by choice

WATCHED = {
    "SOLVER.MAX_ITER": 20,
    "SOLVER.CHECKPOINT_PERIOD": 100,
    "TEST.EVAL_PERIOD": 1,
    "TEST.BEST_METRIC": "validation/total_loss",
    "TEST.BEST_MODE": "min",
    "TEST.PATIENCE": 3,
}


def script(monkeypatch, values):
    """Validation losses in turn; returns those that were asked for."""
    asked = []

    def losses(*_):
        asked.append(values[len(asked)])
        return {"total_loss": asked[-1]}

    monkeypatch.setattr("lsnet_d2.engine.validation_losses", losses)
    return asked


def test_best_checkpoint_and_early_end(folder, tmp_path, monkeypatch):
    asked = script(monkeypatch, [5, 4, 4.5, 3, float("nan"), 3, 3.5, 1, 1])
    cfg = make_cfg(folder, tmp_path, **WATCHED)
    trainer = train(cfg)
    assert trainer.iter == 7 and len(asked) == 7 + 1  # the last one is of the end
    assert names(tmp_path) == ["model_best.pth", "model_final.pth"]
    best, last = (torch.load(tmp_path / f"model_{n}.pth") for n in ("best", "final"))
    assert best["iteration"] == best["trainer"]["iteration"] == 3
    metric = {"metric": ["min", "validation/total_loss"]}
    saved = best["trainer"]["hooks"]["BestMetric"]
    assert saved == {**metric, "best": 3, "best_iteration": 3, "waited": 0}
    assert last["iteration"] == 6
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    # one that has ended does not go on
    script(monkeypatch, [0])
    assert train(cfg, resume=True).iter == 7


def test_the_best_is_known_after_an_interruption(folder, tmp_path, monkeypatch):
    asked = script(monkeypatch, [5, 4, 6, 4, 4, 1])
    cfg = make_cfg(folder, tmp_path, **{**WATCHED, "SOLVER.CHECKPOINT_PERIOD": 3})

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(cfg, At(3, interrupt))
    assert names(tmp_path) == ["model_0000002.pth", "model_best.pth"]
    trainer = train(cfg, resume=True)
    assert trainer.start_iter == 3 and trainer.iter == 5 and asked[:5] == [5, 4, 6, 4, 4]
    saved = torch.load(tmp_path / "model_final.pth")["trainer"]["hooks"]["BestMetric"]
    metric = {"metric": ["min", "validation/total_loss"]}
    assert saved == {**metric, "best": 4, "best_iteration": 1, "waited": 3}


def test_the_last_evaluation_may_be_the_best(folder, tmp_path):
    settings = {**WATCHED, "TEST.PATIENCE": 0, "SOLVER.MAX_ITER": 2, "TEST.EVAL_PERIOD": 5}
    trainer = train(make_cfg(folder, tmp_path, **settings))
    best = torch.load(tmp_path / "model_best.pth")
    assert best["iteration"] == best["trainer"]["iteration"] == 1
    # the file has the weights that were evaluated
    assert best["weights"] == "averaged"
    for name, value in trainer.evaluated_model.state_dict().items():
        assert torch.equal(best["model"][name], value)


def test_unknown_metric(folder, tmp_path):
    cfg = make_cfg(folder, tmp_path, **{**WATCHED, "TEST.BEST_METRIC": "bbox/APP"})
    with pytest.raises(ConfigError, match="BEST_METRIC is 'bbox/APP', .*gives bbox/AP.*valid"):
        train(cfg)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"TEST.BEST_MODE": "least"}, "TEST.BEST_MODE is 'least'; .*max, min"),
        ({"TEST.PATIENCE": 2}, "TEST.PATIENCE needs a TEST.BEST_METRIC"),
        ({"TEST.PATIENCE": -1}, "TEST.PATIENCE is -1"),
        ({"TEST.BEST_METRIC": "a/b", "TEST.EVAL_PERIOD": 0}, "TEST.BEST_METRIC needs .*EVAL_PERI"),
        ({"SOLVER.EMA.DECAY": 1.0}, "SOLVER.EMA.DECAY is 1.0"),
        ({"MODEL.LOAD_PROPOSALS": True}, "TEST.VALIDATION_LOSS and MODEL.LOAD_PROPOSALS"),
        ({"TEST.PRECISE_BN.ENABLED": True}, "PRECISE_BN.ENABLED and SOLVER.EMA.ENABLED"),
    ],
)
def test_options_that_nothing_can_be_made_of(folder, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_cfg(folder, tmp_path, **settings)


def test_an_unreadable_best_is_no_checkpoint_to_go_on_from(folder, tmp_path):
    """``model_best.pth`` is not the last one, though it may be the newest file."""
    cfg = make_cfg(folder, tmp_path, **{"SOLVER.MAX_ITER": 2, "SOLVER.CHECKPOINT_PERIOD": 1})
    trainer = train(cfg)
    trainer.checkpointer.save("model_best", as_last=False, iteration=0)
    checkpointer = LSNetCheckpointer(torch.nn.Identity(), str(tmp_path))
    assert checkpointer.find_checkpoint() == str(tmp_path / "model_final.pth")

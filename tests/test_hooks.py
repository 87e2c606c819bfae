import pytest
import torch
from detectron2.engine import HookBase
from detectron2.engine.train_loop import TrainerBase
from torch import nn

from lsnet_d2.checkpointer import LSNetCheckpointer
from lsnet_d2.errors import ConfigError, NonFiniteWeightsError
from lsnet_d2.hooks import BestMetric, CheckpointOfAverage, WeightAverage, WeightCheck


def averaged(decay, steps, start=0):
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    hook = WeightAverage(model, decay)
    for step in range(start, steps):
        nn.init.constant_(model[0].weight, float(step))
        model[1].running_mean.fill_(step)
        hook.after_step()
    return model, hook


@pytest.mark.parametrize("decay", [0.3, 0.9998])
def test_mean_of_weights(decay):
    model, hook = averaged(decay, 6)
    expected = 0.0
    for n in range(1, 6):
        keep = min(decay, n / (n + 9))
        expected = keep * expected + (1 - keep) * n
    assert hook.averaged[0].weight.item() == pytest.approx(expected)
    assert hook.averaged[1].running_mean.item() == 5  # of the trained model
    assert model[0].weight.item() == 5


def test_checkpoints_have_both(tmp_path):
    model, hook = averaged(0.9, 4)
    files = LSNetCheckpointer(
        model, str(tmp_path), averaged=hook.averaged, average=CheckpointOfAverage(hook)
    )
    files.save("model_0000003", iteration=3)
    saved = torch.load(tmp_path / "model_0000003.pth")
    assert saved["weights"] == "averaged"
    assert torch.equal(saved["model"]["0.weight"], hook.averaged[0].weight)
    assert saved["average"]["trained"]["0.weight"].item() == 3

    # for anything but going on, they are the model's weights
    other, _ = averaged(0.9, 0)
    LSNetCheckpointer(other).load(str(tmp_path / "model_0000003.pth"), strict=True)
    assert torch.equal(other[0].weight, hook.averaged[0].weight)

    other, again = averaged(0.9, 0)
    files = LSNetCheckpointer(
        other, str(tmp_path), averaged=again.averaged, average=CheckpointOfAverage(again)
    )
    files.resume_or_load("", resume=True)
    assert other[0].weight.item() == 3
    assert torch.equal(again.averaged[0].weight, hook.averaged[0].weight)
    for trained, average in ((model, hook), (other, again)):
        nn.init.constant_(trained[0].weight, 9.0)
        average.after_step()
    assert torch.equal(again.averaged[0].weight, hook.averaged[0].weight)


def test_a_mean_starts_anew():
    model, hook = averaged(0.9, 4)
    nn.init.constant_(model[0].weight, 7.0)
    model[1].running_mean.fill_(8)
    hook.start()
    assert hook.averaged[0].weight.item() == 7 and hook.averaged[1].running_mean.item() == 8
    nn.init.constant_(model[0].weight, 9.0)
    hook.after_step()
    assert hook.averaged[0].weight.item() == 9  # as of the first update ever
    assert hook.checkpoint_state()["updates"] == 1


class Steps(TrainerBase):
    def __init__(self, *hooks, model=None):
        super().__init__()
        self.model = model
        self.register_hooks(list(hooks))

    def run_step(self):
        pass


class Spoil(HookBase):
    def after_step(self):
        self.trainer.model.running_var[0] = torch.inf


@pytest.mark.parametrize(("period", "iteration"), [(3, 2), (0, 4)])
def test_statistics_that_are_not_finite(period, iteration):
    trainer = Steps(Spoil(), WeightCheck((period,)), model=nn.BatchNorm1d(2))
    message = f"iteration {iteration}: the buffer running_var is not finite"
    with pytest.raises(NonFiniteWeightsError, match=message) as error:
        trainer.train(0, 5)
    assert error.value.in_all_processes


def test_statistics_of_another_process(monkeypatch):
    trainer = Steps(WeightCheck((1,)), model=nn.BatchNorm1d(2))
    monkeypatch.setattr("detectron2.utils.comm.all_gather", lambda mine: [mine, "the buffer x"])
    with pytest.raises(NonFiniteWeightsError, match="iteration 0: the buffer x is not finite"):
        trainer.train(0, 5)


class Measure(HookBase):
    """Writes down values of an evaluation in turn; None: it gives another one."""

    def __init__(self, *values):
        self.values = values

    def after_step(self):
        if self.trainer.iter + 1 < self.trainer.max_iter:
            self.put(self.values[self.trainer.iter])

    def after_train(self):
        if self.trainer.iter >= self.trainer.max_iter:
            self.put(self.values[-1])

    def put(self, value):
        found = {"other/AP": 1.0} if value is None else {"bbox/AP": value}
        self.trainer.storage.put_scalars(total_loss=1.0, **found, smoothing_hint=False)


def best_of(tmp_path, *values):
    hook = BestMetric(LSNetCheckpointer(nn.Identity(), str(tmp_path)), "bbox/AP", period=1)
    Steps(Measure(*values), hook).train(0, len(values))
    return hook


def test_patience_begins_with_the_first_value(tmp_path):
    """The AP is not a number while nothing is found."""
    nan = float("nan")
    assert best_of(tmp_path, nan, nan, nan, nan).waited == 0
    hook = best_of(tmp_path, nan, nan, 2.0, nan, 1.0, 1.5)
    assert (hook.best, hook.best_iteration, hook.waited) == (2.0, 2, 3)


def test_the_best_of_another_metric_does_not_count(tmp_path, caplog):
    state = best_of(tmp_path, 62.0).state_dict()
    files = LSNetCheckpointer(nn.Identity(), str(tmp_path))
    same = BestMetric(files, "bbox/AP", period=1)
    same.load_state_dict({key: value for key, value in state.items() if key != "metric"})
    assert same.best == 62.0 and "anew" not in caplog.text
    for metric, mode in (("keypoints/AP", "max"), ("bbox/AP", "min")):
        other = BestMetric(files, metric, mode=mode, period=1)
        other.load_state_dict(state)
        assert other.best is None
        assert f"has the max of bbox/AP; the best {metric} is sought anew" in caplog.text


def test_values_are_of_this_evaluation(tmp_path):
    with pytest.raises(ConfigError, match="BEST_METRIC is 'bbox/AP', .* it gives other/AP$"):
        best_of(tmp_path, 1.0, None, 1.0)

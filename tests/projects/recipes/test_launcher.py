import subprocess
import threading

import pytest
from recipes_project import FakeTraining, launcher, train_all, variant

from lsnet_d2.errors import ConfigError, UserError


def test_a_training_that_starts_while_all_are_stopped_is_ended(commands, tmp_path, monkeypatch):
    ended = threading.Event()

    class Starting(FakeTraining):
        def __init__(self, command, **kwargs):
            super().__init__(command, **kwargs)
            stop = threading.Thread(target=starter.stop)
            stop.start()
            stop.join(0.3)  # it would be over if it did not wait for this one

        def wait(self):
            return -15 if ended.wait(5) else 0

        def terminate(self):
            ended.set()

    monkeypatch.setattr(subprocess, "Popen", Starting)
    starter = launcher.Launcher(["MODEL.DEVICE", "cpu"])
    opts = starter.schedule(variant(), {}, iterations=10, evaluations=1)
    assert starter.run(variant(), {}, tmp_path / "first", seed=1, opts=opts) == -15
    with pytest.raises(UserError, match="bbox: LSNet: stopped before it began"):
        starter.run(variant(), {}, tmp_path / "second", seed=2, opts=opts)
    assert len(commands) == 1


def test_configs_are_checked_before_anything_is_trained(commands, tmp_path):
    with pytest.raises(ConfigError, match="bbox: LSNet: .*SOLVER.BASE_LRR"):
        train_all(tmp_path, variant(), variant(opts={"SOLVER.BASE_LRR": "1"}))
    with pytest.raises(ConfigError, match="a table has the figures of one data set"):
        train_all(tmp_path, variant(opts={"DATASETS.TEST": "('shapes_val', 'shapes_train')"}))
    assert not commands

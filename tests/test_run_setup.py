import argparse
import os

import pytest
import tiny_coco

from lsnet_d2 import run_setup
from lsnet_d2.errors import UserError


def test_schedule_is_that_of_the_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(run_setup, "default_setup", lambda cfg, args: None)
    opts = ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path), "SOLVER.IMS_PER_BATCH", "8"]
    config_file = str(tiny_coco.ROOT / "configs" / "Base-LSNet.yaml")
    args = argparse.Namespace(config_file=config_file, opts=[*opts, "SOLVER.MAX_ITER", "10"])
    cfg = run_setup.setup(args)
    assert cfg.is_frozen()
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS) == (0.005, 10, 1000)


def test_output_that_cannot_be_written():
    if not os.path.isdir("/proc/self"):
        pytest.skip("no folder that nobody can write into")
    opts = ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", "/proc/self"]
    with pytest.raises(UserError, match="/proc/self: cannot write into this folder"):
        run_setup.setup(argparse.Namespace(config_file="", opts=opts))

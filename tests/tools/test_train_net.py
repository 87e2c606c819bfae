import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny_coco
import torch
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model
from tiny_coco import run_tool

from lsnet_d2.checkpointer import LSNetCheckpointer
from lsnet_d2.config_file import load_config
from lsnet_d2.errors import ConfigError
from lsnet_d2.launching import describe_interruption

TOOL = tiny_coco.ROOT / "tools" / "train_net.py"
spec = importlib.util.spec_from_file_location("train_net", TOOL)
train_net = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_net)


@pytest.fixture
def data(tmp_path):
    return tiny_coco.write_coco(tmp_path)


def train(data, *args, opts=(), architecture="RetinaNet"):
    return run_tool(
        "train_net.py",
        # fmt: off
        "--config-file",
        tiny_coco.write_config(data, architecture),
        *args,
        "OUTPUT_DIR",
        data / "output",
        "SOLVER.CHECKPOINT_PERIOD",
        100,
        *opts,
        # fmt: on
        datasets=data,
    )


def assert_user_error(result, *parts):
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in lines[0]


def test_train_then_evaluate_then_resume(data):
    result = train(data)
    assert result.returncode == 0, result.stderr
    assert "total_loss" in result.stdout and "eta" in result.stdout
    assert "AP,AP50,AP75" in result.stdout
    final = data / "output" / "model_final.pth"

    before = (data / "output" / "config.yaml").read_text()
    result = train(data, "--eval-only", opts=["MODEL.WEIGHTS", final])
    assert result.returncode == 0, result.stderr
    assert "AP,AP50,AP75" in result.stdout
    # --resume can be given the config of the training still
    assert (data / "output" / "config.yaml").read_text() == before
    assert str(final) not in before

    result = train(data, "--resume", opts=["SOLVER.MAX_ITER", 5])
    assert result.returncode == 0, result.stderr
    assert "Starting training from iteration 3" in result.stdout
    assert torch.load(final, weights_only=True)["iteration"] == 4

    result = train(
        data, "--eval-only", opts=["MODEL.WEIGHTS", final, "MODEL.RETINANET.NUM_CONVS", 2]
    )
    assert_user_error(result, "model_final.pth is a checkpoint of another model")


def test_evaluation_with_augmentation(data):
    cfg = load_config(str(tiny_coco.write_config(data, "LSNet")), ["MODEL.DEVICE", "cpu"])
    torch.manual_seed(8)  # with some weights nothing is detected
    LSNetCheckpointer(build_model(cfg), str(data)).save("weights")
    opts = ["MODEL.WEIGHTS", data / "weights.pth", "TEST.AUG.ENABLED", "True"]
    sizes = ["TEST.AUG.MIN_SIZES", "(40, 60)", "MODEL.LSNET.SCORE_THRESH_TEST", "0.0"]
    result = train(data, "--eval-only", opts=opts + sizes, architecture="LSNet")
    assert result.returncode == 0, result.stderr
    assert "Running inference with test-time augmentation" in result.stdout
    assert result.stdout.count("AP,AP50,AP75") == 2
    for folder in ("inference", "inference_TTA"):
        assert json.loads((data / "output" / folder / "coco_instances_results.json").read_text())

    sizes = ["TEST.AUG.MIN_SIZES", "(40, 60)", "TEST.AUG.SIZE_RANGES", "((0, 32),)"]
    result = train(data, "--eval-only", opts=opts + sizes, architecture="LSNet")
    assert_user_error(result, "TEST.AUG.SIZE_RANGES has 1 ranges", "2 TEST.AUG.MIN_SIZES")


def test_user_errors(data):
    assert_user_error(train(data, opts=["SOLVER.MAXITER", 1]), "SOLVER.MAXITER", "SOLVER.MAX_ITER")
    assert_user_error(train(data, opts=["MODEL.DEVICE", "cuda"]), "MODEL.DEVICE is 'cuda'")


def test_missing_annotations(data):
    tiny_coco.json_file(data, "train").unlink()
    assert_user_error(train(data), "instances_train2017.json", "DETECTRON2_DATASETS")


def check_processes(data, *args):
    parser = default_argument_parser()
    config = str(tiny_coco.write_config(data))
    train_net.check_processes(parser.parse_args(["--config-file", config, *args]))


def test_processes_need_gpus_of_their_own(data, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    check_processes(data, "--num-gpus", "1")
    check_processes(data, "--num-gpus", "8", "MODEL.DEVICE", "cpu")
    with pytest.raises(ConfigError, match="--num-gpus is 8, but there is no GPU"):
        check_processes(data, "--num-gpus", "8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_processes(data, "--num-gpus", "2")
    check_processes(data, "MODEL.DEVICE", "cuda:1")
    with pytest.raises(ConfigError, match="MODEL.DEVICE is 'cuda:1', .*set it to 'cuda'"):
        check_processes(data, "--num-gpus", "2", "MODEL.DEVICE", "cuda:1")
    with pytest.raises(ConfigError, match="--num-gpus is 3, but there are 2"):
        check_processes(data, "--num-gpus", "3")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("SIGKILL", "error: process 1 was ended by SIGKILL (out of memory?);"),
        ("SIGSEGV", "error: process 1 was ended by SIGSEGV;"),
    ],
)
def test_a_process_that_a_signal_ends_is_named(data, monkeypatch, capsys, name, text):
    def launch(*args, **kwargs):
        raise torch.multiprocessing.ProcessExitedException("", 1, 99, -9, name)

    monkeypatch.setattr(train_net, "launch", launch)
    config = str(tiny_coco.write_config(data))
    monkeypatch.setattr("sys.argv", ["train_net.py", "--config-file", config])
    with pytest.raises(SystemExit) as exit_info:
        train_net.main()
    assert exit_info.value.code == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("architecture", tiny_coco.CONFIGS)
def test_killed_training_resumes(data, architecture):
    """SIGKILL at a random moment; the second run goes on from a whole checkpoint."""
    args = [
        # fmt: off
        "--config-file",
        tiny_coco.write_config(data, architecture),
        "OUTPUT_DIR",
        data / "output",
        "SOLVER.CHECKPOINT_PERIOD",
        1,
        "MODEL.DEVICE",
        "cpu",
        # fmt: on
    ]
    process = subprocess.Popen(
        [sys.executable, *map(str, [TOOL, *args, "SOLVER.MAX_ITER", 100000])],
        env=tiny_coco.tool_environment(data),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.time() + 120
        while not (data / "output" / "model_0000002.pth").exists():
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = (data / "output" / "last_checkpoint").read_text()
    done = int(last.removeprefix("model_").removesuffix(".pth"))
    assert done >= 1
    result = run_tool("train_net.py", "--resume", *args, "SOLVER.MAX_ITER", done + 3, datasets=data)
    assert result.returncode == 0, result.stderr
    assert f"Starting training from iteration {done + 1}" in result.stdout
    final = torch.load(data / "output" / "model_final.pth", weights_only=True)
    assert final["iteration"] == done + 2


def start(data, *opts):
    """A training without end, in a group of its own."""
    config = tiny_coco.write_config(data, "LSNet")
    opts = ["OUTPUT_DIR", data / "output", "SOLVER.MAX_ITER", 100000, "MODEL.DEVICE", "cpu", *opts]
    return subprocess.Popen(
        [sys.executable, *map(str, [TOOL, "--config-file", config, *opts])],
        env=tiny_coco.tool_environment(data),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_interrupted_training_says_how_to_go_on(data):
    """Ctrl-C reaches the workers of the data loader too."""
    process = start(data, "DATALOADER.NUM_WORKERS", 2)
    try:
        deadline = time.time() + 120
        while not (data / "output" / "model_0000002.pth").exists():
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        _, messages = process.communicate(timeout=180)  # the end of Python is slow under load
    finally:
        process.kill()
    last = data / "output" / (data / "output" / "last_checkpoint").read_text()
    assert process.returncode == 130, messages
    assert messages.splitlines()[-1] == (
        f"interrupted; the same command with --resume goes on from {last}"
    )
    assert "Traceback" not in messages
    assert not list((data / "output").glob(".*.partial"))
    assert "iteration" in torch.load(last, weights_only=True)
    assert describe_interruption(str(data)) == f"interrupted before the first checkpoint in {data}"


DIVERGING = ["SOLVER.BASE_LR", 1e30, "SOLVER.WARMUP_ITERS", 0, "MODEL.DEVICE", "cpu"]
DIVERGING += ["SOLVER.MAX_ITER", 50, "SOLVER.CLIP_GRADIENTS.ENABLED", False]


def test_diverging_training_is_stopped(data):
    result = train(data, opts=DIVERGING, architecture="LSNet")
    assert_user_error(result, "iteration ", "loss_", "for the images", "/train2017/00000000000")
    assert "Traceback" not in result.stdout
    assert not list((data / "output").glob("*model*"))


@pytest.mark.slow
def test_diverging_training_of_two_processes_is_stopped(data):
    args = ["--num-gpus", 2, "--dist-url", "auto"]
    result = train(data, *args, opts=DIVERGING, architecture="LSNet")
    assert_user_error(result, "in process ", "loss_", "for the images", "/train2017/00000000000")
    assert "Traceback" not in result.stdout
    assert not list((data / "output").glob("*model*"))


@pytest.mark.slow
def test_two_processes_on_cpu(data):
    result = train(data, "--num-gpus", 2, "--dist-url", "auto", opts=["MODEL.DEVICE", "cpu"])
    assert result.returncode == 0, result.stderr
    assert "World size: 2" in result.stdout
    rows = [json.loads(row) for row in (data / "output" / "metrics.json").open()]
    assert any("total_loss" in row for row in rows)
    assert torch.load(data / "output" / "model_final.pth", weights_only=True)["iteration"] == 2


@pytest.mark.slow
def test_two_processes_evaluate_as_one(data):
    """All that is found comes together, landmarks too."""
    cfg = load_config(str(tiny_coco.write_config(data, "LSNet")), ["MODEL.DEVICE", "cpu"])
    LSNetCheckpointer(tiny_coco.make_finding_model(cfg, seed=1), str(data)).save("weights")
    opts = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", data / "weights.pth"]
    opts += ["MODEL.LSNET.SCORE_THRESH_TEST", "0.0"]
    file = data / "output" / "inference" / "coco_instances_results.json"
    found = []
    for processes in (1, 2):
        args = ["--eval-only", "--num-gpus", processes, "--dist-url", "auto"]
        result = train(data, *args, opts=opts, architecture="LSNet")
        assert result.returncode == 0, result.stderr
        found.append(json.loads(file.read_text()))
        file.unlink()
    assert {entry["image_id"] for entry in found[0]} == {1, 2}
    assert np.ptp([len(entry["extreme_points"]) for entry in found[0]]) == 0
    assert found[1] == found[0]

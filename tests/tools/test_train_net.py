import json
import signal
import subprocess
import sys
import time

import pytest
import tiny_coco
import torch
from tiny_coco import run_tool


@pytest.fixture
def data(tmp_path):
    return tiny_coco.write_coco(tmp_path)


def train(data, *args, opts=()):
    return run_tool(
        "train_net.py",
        # fmt: off
        "--config-file",
        tiny_coco.write_config(data),
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

    result = train(data, "--eval-only", opts=["MODEL.WEIGHTS", final])
    assert result.returncode == 0, result.stderr
    assert "AP,AP50,AP75" in result.stdout

    result = train(data, "--resume", opts=["SOLVER.MAX_ITER", 5])
    assert result.returncode == 0, result.stderr
    assert "Starting training from iteration 3" in result.stdout
    assert torch.load(final, weights_only=True)["iteration"] == 4

    result = train(
        data, "--eval-only", opts=["MODEL.WEIGHTS", final, "MODEL.RETINANET.NUM_CONVS", 2]
    )
    assert_user_error(result, "model_final.pth is a checkpoint of another model")


def test_user_errors(data):
    assert_user_error(train(data, opts=["SOLVER.MAXITER", 1]), "SOLVER.MAXITER", "SOLVER.MAX_ITER")
    assert_user_error(train(data, opts=["MODEL.DEVICE", "cuda"]), "MODEL.DEVICE is 'cuda'")


def test_missing_annotations(data):
    tiny_coco.json_file(data, "train").unlink()
    assert_user_error(train(data), "instances_train2017.json", "DETECTRON2_DATASETS")


def test_killed_training_resumes(data):
    """SIGKILL at a random moment; the second run goes on from a whole checkpoint."""
    args = [
        # fmt: off
        "--config-file",
        tiny_coco.write_config(data),
        "OUTPUT_DIR",
        data / "output",
        "SOLVER.CHECKPOINT_PERIOD",
        1,
        "MODEL.DEVICE",
        "cpu",
        # fmt: on
    ]
    tool = tiny_coco.ROOT / "tools" / "train_net.py"
    process = subprocess.Popen(
        [sys.executable, *map(str, [tool, *args, "SOLVER.MAX_ITER", 100000])],
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


@pytest.mark.slow
def test_two_processes_on_cpu(data):
    result = train(data, "--num-gpus", 2, "--dist-url", "auto", opts=["MODEL.DEVICE", "cpu"])
    assert result.returncode == 0, result.stderr
    assert "World size: 2" in result.stdout
    rows = [json.loads(row) for row in (data / "output" / "metrics.json").open()]
    assert any("total_loss" in row for row in rows)
    assert torch.load(data / "output" / "model_final.pth", weights_only=True)["iteration"] == 2
    assert (
        json.loads((data / "output" / "inference" / "coco_instances_results.json").read_text())
        == []
    )

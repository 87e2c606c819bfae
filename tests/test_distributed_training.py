"""Several processes on the CPU, with gloo."""

import json
import os
import subprocess
import sys

import pytest
import tiny_coco
import torch
import torch.distributed as dist
from detectron2.utils.events import EventStorage
from tiny_model import make_input, tiny_model

from lsnet_d2.training_loop import LSNetTrainLoop, wrap_distributed
from lsnet_d2.validation_loss import validation_losses

JOINT = {"TASK": "joint", "BRANCHES": ["extreme", "contour", "keypoint"]}
POLISHED = {
    **JOINT,
    **{"POLISH_IN_FEATURES": ["p3", "p4"], "POLISH_GRID": 2, "POLISH_STEPS": 2},
    # more than there are, so that none is chosen at random
    **{"POLISH_POSITIVES": 1000, "KEYPOINT_SEARCH": True, "CLS_SOFT_LABELS": True},
    **{"TRACED_POINTS": 48},
}
# The first process gets many objects, the second few, and none at all in its last image.
BATCH = [
    make_input([[10, 12, 60, 70], [70, 20, 120, 90], [5, 60, 40, 90]], [0, 1, 2], seed=1),
    make_input([[20, 12, 90, 60], [70, 50, 120, 90]], [1, 1], seed=2),
    make_input([[30, 40, 54, 70]], [2], seed=3),
    make_input([], [], seed=4),
]
BATCH[1]["instances"].gt_keypoints.tensor[0, :, 2] = 0  # and one of them has no keypoints


def gradients(batches, **loop):
    model = wrap_distributed(tiny_model(**POLISHED))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loop = LSNetTrainLoop(model, batches, optimizer, **loop)
    loop.iter = 0
    with EventStorage():
        loop.run_step()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def steps_with_unused_weights(batch):
    """The coarse levels are made by the pyramid, and nothing looks at them."""
    model = wrap_distributed(tiny_model(IN_FEATURES=["p3", "p4", "p5"]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    parts = [batch[:1], batch[1:]]
    loop = LSNetTrainLoop(model, 2 * parts, optimizer, accumulation_steps=2)
    with EventStorage():
        for loop.iter in range(2):
            loop.run_step()
    return {name: p.detach() for name, p in model.module.named_parameters()}


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/group", world_size=2, rank=rank)
    half = BATCH[2 * rank : 2 * rank + 2]
    results = {
        "halves": gradients([half]),
        "parts": gradients([half[:1], half[1:]], accumulation_steps=2),
        "unused": steps_with_unused_weights(half),
        # one image has nothing beside it but the first, which does not count there
        "validation": validation_losses(
            tiny_model(**POLISHED),
            [(BATCH[:1], 1), (BATCH[2:3], 1)] if rank == 0 else [(BATCH[1:2], 1), (BATCH[:1], 0)],
            seed=1,
        ),
    }
    if rank == 0:
        torch.save(results, f"{folder}/gradients.pth")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_half_the_batch_have_the_gradient_of_one(tmp_path):
    torch.multiprocessing.start_processes(work, (str(tmp_path),), nprocs=2)
    found = torch.load(tmp_path / "gradients.pth")
    whole = gradients([BATCH])
    assert (found["halves"] - whole).norm() < 1e-5 * whole.norm()
    # a step of two parts has the mean of their gradients, each of both processes
    first, second = (gradients([[BATCH[i], BATCH[i + 2]]]) for i in (0, 1))
    expected = (first + second) / 2
    assert (found["parts"] - expected).norm() < 1e-5 * expected.norm()
    assert (expected - whole).norm() > 1e-3 * whole.norm()  # which is another one

    before = dict(tiny_model(IN_FEATURES=["p3", "p4", "p5"]).named_parameters())
    unchanged = {name for name, p in found["unused"].items() if torch.equal(p, before[name])}
    p6_and_p7 = {f"backbone.down.{i}.{kind}" for i in (2, 3) for kind in ("weight", "bias")}
    assert {name for name in unchanged if name.startswith("backbone.")} == p6_and_p7

    alone = validation_losses(tiny_model(**POLISHED), [([image], 1) for image in BATCH[:3]], 1)
    assert found["validation"] == pytest.approx(alone, rel=1e-5)


def torchrun(data, *args):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    tool = tiny_coco.ROOT / "tools" / "train_net.py"
    config = tiny_coco.write_config(data, "LSNet")
    return subprocess.run(
        [*command, "--nproc-per-node", "2", str(tool), "--config-file", str(config), *args],
        env={
            **os.environ,
            "DETECTRON2_DATASETS": str(data),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join([str(tiny_coco.ROOT), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_torchrun(tmp_path):
    data = tiny_coco.write_coco(tmp_path)
    output = data / "output"
    result = torchrun(data, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(output))
    assert result.returncode == 0, result.stderr
    assert (output / "model_final.pth").is_file()
    assert "World size: 2" in (output / "log.txt").read_text()
    lines = map(json.loads, (output / "metrics.json").read_text().splitlines())
    assert any("total_loss" in line for line in lines)


@pytest.mark.slow
def test_torchrun_and_numbers_of_processes(tmp_path):
    data = tiny_coco.write_coco(tmp_path)
    result = torchrun(data, "--num-gpus", "2", "MODEL.DEVICE", "cpu")
    assert result.returncode != 0
    assert "error: torchrun has started the processes: leave out --num-gpus" in result.stderr

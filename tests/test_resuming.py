"""A training that is interrupted at any moment ends with the weights of one that is not."""

import json
import multiprocessing
import os
import shutil
import signal

import numpy as np
import pytest
import tiny_coco
import torch
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng
from PIL import Image

from lsnet_d2.config_file import load_config
from lsnet_d2.engine import LSNetTrainer
from lsnet_d2.errors import CheckpointError

ITERATIONS, PERIOD = 7, 3
COUNT = 7  # images, every third of them higher than wide


def write_data(folder):
    """Images of both orientations, with something to see in them."""
    generator = np.random.default_rng(0)
    (folder / "images").mkdir()
    images, annotations = [], []
    for number in range(1, COUNT + 1):
        height, width = (64, 48) if number % 3 == 0 else (48, 64)
        name = f"{number}.png"
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        x, y, w, h = 4 + 2 * number, 6 + number, 20, 24
        annotations.append(
            {
                "id": number,
                "image_id": number,
                "category_id": 1 + number % 2,
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": 0,
                "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
            }
        )
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    data = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "data.json").write_text(json.dumps(data))
    return folder


def make_cfg(folder, output, *opts, architecture="LSNet", **settings):
    settings = {
        "MODEL.DEVICE": "cpu",
        "OUTPUT_DIR": str(output),
        "DATASETS.COCO_FILES": f"[['own', '{folder}/data.json', '{folder}/images']]",
        "DATASETS.TRAIN": "('own',)",
        "DATASETS.TEST": "('own',)",
        "TEST.EVAL_PERIOD": 2,
        "TEST.VALIDATION_LOSS": True,
        "INPUT.MIN_SIZE_TRAIN": "(40, 48, 56, 64)",
        "MODEL.LSNET.NUM_CLASSES": 2,
        "MODEL.RETINANET.NUM_CLASSES": 2,
        "MODEL.LSNET.POLISH_IN_FEATURES": "('p3', 'p4')",
        "MODEL.LSNET.POLISH_POSITIVES": 2,
        "SOLVER.BASE_LR": 0.02,
        "SOLVER.EMA.ENABLED": True,
        "SOLVER.MAX_ITER": ITERATIONS,
        "SOLVER.CHECKPOINT_PERIOD": PERIOD,
        **settings,
    }
    path = tiny_coco.write_config(folder, architecture)
    return load_config(str(path), [*map(str, sum(settings.items(), ())), *opts])


class At(HookBase):
    """Does something before an iteration."""

    def __init__(self, iteration, action):
        self.iteration, self.action = iteration, action

    def before_step(self):
        if self.trainer.iter == self.iteration:
            self.action()


def train(cfg, *hooks, resume=False):
    """As tools/train_net.py does it."""
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED)
    trainer = LSNetTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.register_hooks(list(hooks))
    trainer.train()
    return trainer


def killed(cfg, iteration):
    """Train in a process that is killed before this iteration."""

    def work():
        train(cfg, At(iteration, lambda: os.kill(os.getpid(), signal.SIGKILL)))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def final(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)


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
    train(make_cfg(folder, folder / "whole"))
    return final(folder / "whole")


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


def test_weights_depend_on_the_seed(folder, uninterrupted, tmp_path):
    cfg = make_cfg(folder, tmp_path, SEED=2)
    train(cfg)
    name = "backbone.bottom_up.stem.conv1.weight"
    assert not torch.equal(final(tmp_path)["model"][name], uninterrupted["model"][name])


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


def test_averaged_weights_are_not_gone_on_without(folder, tmp_path):
    cfg = make_cfg(folder, tmp_path, **{"SOLVER.MAX_ITER": 1})
    train(cfg)
    cfg = make_cfg(folder, tmp_path, **{"SOLVER.EMA.ENABLED": False})
    with pytest.raises(CheckpointError, match=r"model_final.pth is of .*SOLVER.EMA.ENABLED must"):
        train(cfg, resume=True)

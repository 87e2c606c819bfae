"""A COCO data set of a few small images, and small detectors that train on it in seconds."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.modeling import build_model
from PIL import Image

from lsnet_d2.config_file import load_config

ROOT = Path(__file__).resolve().parent.parent
SIZE = (48, 64)  # height, width
SPLITS = {"train": 4, "val": 2}

BASE = """
MODEL:
  WEIGHTS: ""
  BACKBONE:
    FREEZE_AT: 0
  RESNETS:
    DEPTH: 50
    STEM_OUT_CHANNELS: 16
    RES2_OUT_CHANNELS: 16
    WIDTH_PER_GROUP: 4
    OUT_FEATURES: ["res3", "res4", "res5"]
    NORM: "BN"
  FPN:
    IN_FEATURES: ["res3", "res4", "res5"]
INPUT:
  MIN_SIZE_TRAIN: [48]
  MIN_SIZE_TEST: 48
DATASETS:
  TRAIN: ["coco_2017_train"]
  TEST: ["coco_2017_val"]
DATALOADER:
  NUM_WORKERS: 0
SOLVER:
  IMS_PER_BATCH: 2
  BASE_LR: 0.001
  MAX_ITER: 3
  STEPS: []
  CHECKPOINT_PERIOD: 1
  CLIP_GRADIENTS:
    ENABLED: True
    CLIP_TYPE: "full_model"
    CLIP_VALUE: 35.0
SEED: 1
VERSION: 2
"""

CONFIGS = {
    "RetinaNet": """
_BASE_: "base.yaml"
MODEL:
  META_ARCHITECTURE: "RetinaNet"
  BACKBONE:
    NAME: "build_retinanet_resnet_fpn_backbone"
  FPN:
    OUT_CHANNELS: 16
  ANCHOR_GENERATOR:
    SIZES: [[16], [32], [64], [128], [256]]
  RETINANET:
    NUM_CLASSES: 80
    NUM_CONVS: 1
""",
    "LSNet": """
_BASE_: "base.yaml"
MODEL:
  META_ARCHITECTURE: "LSNet"
  BACKBONE:
    NAME: "build_lsnet_resnet_fpn_backbone"
  FPN:
    OUT_CHANNELS: 64
    NORM: "GN"
  LSNET:
    NUM_CONVS: 1
""",
}


def write_config(folder: Path, architecture: str = "RetinaNet") -> Path:
    (Path(folder) / "base.yaml").write_text(BASE)
    path = Path(folder) / "tiny.yaml"
    path.write_text(CONFIGS[architecture])
    return path


def write_coco(folder: Path) -> Path:
    """Write the data under ``folder`` as Detectron2's builtin COCO expects it; returns it."""
    root = Path(folder) / "coco"
    (root / "annotations").mkdir(parents=True)
    categories = [{"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]]
    for split, count in SPLITS.items():
        images, annotations = [], []
        (root / f"{split}2017").mkdir()
        for number in range(1, count + 1):
            x, y, w, h = 8 + 4 * number, 10, 24, 20
            pixels = np.full((*SIZE, 3), 40 * number, np.uint8)
            pixels[y : y + h, x : x + w] = (220, 30, 30)
            name = f"{number:012d}.png"
            Image.fromarray(pixels).save(root / f"{split}2017" / name)
            images.append({"id": number, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
            annotations.append(
                {
                    "id": number,
                    "image_id": number,
                    "category_id": 1 if number % 2 else 3,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )
        dataset = {
            "info": {},
            "images": images,
            "annotations": annotations,
            "categories": categories,
        }
        json_file(folder, split).write_text(json.dumps(dataset))
    return Path(folder)


def json_file(folder: Path, split: str) -> Path:
    return Path(folder) / "coco" / "annotations" / f"instances_{split}2017.json"


@contextmanager
def registered(folder: Path, architecture: str) -> Iterator[None]:
    """Within the block there are a small detector's config and data under ``folder``, the data
    registered as tiny_train and tiny_val."""
    write_coco(folder)
    write_config(folder, architecture)
    forget_data()  # of a test that has loaded a config with these names
    for split in SPLITS:
        register_coco_instances(
            f"tiny_{split}",
            {},
            str(json_file(folder, split)),
            str(folder / "coco" / f"{split}2017"),
        )
    try:
        yield
    finally:
        forget_data()


def forget_data() -> None:
    """Take tiny_train and tiny_val out of the catalogs."""
    for split in SPLITS:
        DatasetCatalog.pop(f"tiny_{split}", None)
        MetadataCatalog.pop(f"tiny_{split}", None)


def registered_cfg(folder: Path, *opts: str) -> CfgNode:
    """The config of :func:`registered`, with results below ``folder``."""
    data = ["DATASETS.TRAIN", "('tiny_train',)", "DATASETS.TEST", "('tiny_val',)"]
    output = str(folder / "output")
    return load_config(
        str(folder / "tiny.yaml"), ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", output, *data, *opts]
    )


@contextmanager
def edited(folder: Path, split: str) -> Iterator[dict]:
    """What the file says, which is written again when the block ends."""
    path = json_file(folder, split)
    dataset = json.loads(path.read_text())
    yield dataset
    path.write_text(json.dumps(dataset))


def change_annotations(folder: Path, split: str, change: Callable[[dict], None]) -> None:
    """Have ``change`` called with each annotation of the file."""
    with edited(folder, split) as dataset:
        for annotation in dataset["annotations"]:
            change(annotation)


def tool_environment(datasets: Path | None = None) -> dict[str, str]:
    """Variables for a tool: no windows, no GPUs, and data sets under a folder."""
    env = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    env["CUDA_VISIBLE_DEVICES"] = ""
    env["OMP_NUM_THREADS"] = "1"
    if datasets:
        env["DETECTRON2_DATASETS"] = str(datasets)
    return env


def run_tool(name: str, *args: object, datasets: Path | None = None) -> subprocess.CompletedProcess:
    """Run a tool as a user does."""
    return subprocess.run(
        [sys.executable, ROOT / "tools" / name, *map(str, args)],
        capture_output=True,
        text=True,
        env=tool_environment(datasets),
        timeout=300,
        cwd=ROOT,
    )


def load_tiny_config(folder: Path, *opts: str) -> CfgNode:
    """The config that :func:`write_config` writes, with results below ``folder``."""
    output = str(Path(folder) / "output")
    return load_config(
        str(write_config(folder)), ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", output, *opts]
    )


def run_tool_here(monkeypatch: pytest.MonkeyPatch, name: str, *args: object) -> int:
    """Exit status of a tool that is run in this process, which takes no time to start."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
    try:
        runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")
    except SystemExit as exit_:
        return exit_.code
    return 0


def make_finding_model(cfg: CfgNode, seed: int) -> torch.nn.Module:
    """An LSNet with random weights that finds much in anything."""
    torch.manual_seed(seed)
    model = build_model(cfg)
    for name, parameter in model.named_parameters():
        if name.startswith("head."):
            parameter.data += 0.05 * torch.randn_like(parameter)
        if name.endswith("conv3.norm.weight"):
            parameter.data.zero_()  # untrained residuals would grow beyond bounds
    return model

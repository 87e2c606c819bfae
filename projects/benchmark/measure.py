"""Measures one thing of one model, or of the data side, and prints it as a line of JSON.

``tools/benchmark.py`` starts it. A process measures once and ends: what an earlier measurement has
left in caches and in memory would count in the next.
"""

import argparse
import ctypes
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from detectors import DETECTORS, build
from detectron2 import model_zoo
from detectron2.data import DatasetMapper
from detectron2.utils.events import EventStorage
from inputs import dataset_dicts, ellipses, model_inputs
from pycocotools import mask as mask_util
from torch import nn

from lsnet_d2.config_file import load_config
from lsnet_d2.data.dataset_mapper import LSNetDatasetMapper
from lsnet_d2.data.polygons import polygons_to_rle
from lsnet_d2.modeling import LSNet
from lsnet_d2.modeling.blocks import Tower
from lsnet_d2.modeling.head import SampledPredictor

ROOT = Path(__file__).resolve().parents[2]
CONTOURS = 100  # of an image, which become RLEs
CONTOUR_IMAGE = (480, 640)
MAPPED_IMAGES = 16


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.inference_mode()
def inference(name: str, args: argparse.Namespace) -> dict:
    """Latency of an image, images a second in a batch, and for LSNet what its stages take."""
    inputs = model_inputs(args.batch, *args.size)
    model = build(name, args.config_file, inputs[0])
    detections = len(model(inputs[:1])[0]["instances"])
    if isinstance(model, LSNet):
        passes = [stages(model, inputs[:1]) for _ in range(args.repeats)]
        result = {
            "inference": statistics.median(sum(times.values()) for times in passes),
            "stages": {name: statistics.median(t[name] for t in passes) for name in passes[0]},
        }
    else:
        result = {"inference": seconds(lambda: model(inputs[:1]), args.repeats)}
    images_per_second = len(inputs) / seconds(lambda: model(inputs), 1)
    return {**result, "images_per_second": images_per_second, "detections": detections}


def training(name: str, args: argparse.Namespace) -> dict:
    """Time of a step, and how far the process's memory grows beyond the model's own."""
    inputs = model_inputs(args.train_batch, *args.train_size)
    model = build(name, args.config_file, inputs[0]).train()
    # Without a learning rate the update costs the same, and every step does the same work.
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.0, momentum=0.9
    )

    def step() -> None:
        loss = sum(model(inputs).values())
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    reset_peak_memory()
    before = memory("VmRSS")
    with EventStorage():
        step()
        time_of_step = seconds(step, args.repeats)
    return {"train_step": time_of_step, "train_memory": memory("VmHWM") - before}


def memory(field: str) -> int:
    """Bytes of this process: now ("VmRSS"), or at most so far ("VmHWM")."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}: the benchmark needs Linux")


def reset_peak_memory() -> None:
    """Let the peak start anew, at what is in use now."""
    # what the allocator keeps of freed memory would serve the next step uncounted
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


class StageClock:
    """Times of modules within a forward pass, by hooks.

    Attributes:
        times: seconds by name, summed over calls.
    """

    def __init__(self) -> None:
        self.times: dict[str, float] = defaultdict(float)
        self._starts: dict[nn.Module, float] = {}
        self._hooks = []

    def watch(self, name: str, module: nn.Module) -> None:
        def start(module: nn.Module, _inputs: tuple) -> None:
            self._starts[module] = time.perf_counter()

        def end(module: nn.Module, _inputs: tuple, _output: object) -> None:
            self.times[name] += time.perf_counter() - self._starts.pop(module)

        self._hooks += [
            module.register_forward_pre_hook(start),
            module.register_forward_hook(end),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def stages(model: LSNet, inputs: list[dict]) -> dict[str, float]:
    """Seconds of the parts of a forward pass, which add up to the whole.

    "backbone" with its pyramid; "towers"; "init": the first vectors; "sampling": making the grid
    and sampling on three levels; "prediction": from samples to classes and refined vectors;
    "postprocessing": all else, from scores to instances, and normalising the image.
    """
    clock = StageClock()
    for name, module in (("model", model), ("backbone", model.backbone), ("head", model.head)):
        clock.watch(name, module)
    for module in model.head.modules():
        if isinstance(module, Tower):
            clock.watch("towers", module)
        elif isinstance(module, SampledPredictor):
            clock.watch("predictors", module)
            clock.watch("samplers", module.sample)
    for layers in model.head.branches.values():
        clock.watch("init", layers.init_conv)
        clock.watch("init", layers.init_out)
    model(inputs)
    clock.remove()
    times = clock.times
    prediction = times["predictors"] - times["samplers"]
    return {
        "backbone": times["backbone"],
        "towers": times["towers"],
        "init": times["init"],
        "sampling": times["head"] - times["towers"] - times["init"] - prediction,
        "prediction": prediction,
        "postprocessing": times["model"] - times["backbone"] - times["head"],
    }


def data(_name: str, args: argparse.Namespace) -> dict:
    """Contours to RLEs with and without bitmaps; our mapper and Detectron2's with masks."""
    contours = ellipses(np.random.default_rng(0), CONTOURS, *CONTOUR_IMAGE)
    result = {
        "rle": seconds(lambda: polygons_to_rle(contours, *CONTOUR_IMAGE), 5 * args.repeats),
        "bitmaps": seconds(lambda: bitmaps_to_rle(contours, *CONTOUR_IMAGE), 5 * args.repeats),
    }
    with tempfile.TemporaryDirectory() as folder:
        dicts = dataset_dicts(Path(folder), MAPPED_IMAGES)
        for name, mapper in mappers().items():
            result[name] = seconds(lambda m=mapper: map_all(m, dicts), args.repeats) / len(dicts)
    return result


def bitmaps_to_rle(contours: np.ndarray, height: int, width: int) -> list[dict]:
    """The masks of contours by way of drawing each."""
    rles = []
    for contour in contours:
        bitmap = np.zeros((height, width), dtype=np.uint8)
        cv2.fillPoly(bitmap, [contour.round().astype(np.int32)], 1)
        rle = mask_util.encode(np.asfortranarray(bitmap))
        rles.append({**rle, "counts": rle["counts"].decode("ascii")})
    return rles


def mappers() -> dict[str, DatasetMapper]:
    """Ours for boxes and for contours, and Detectron2's for masks; images of the same size."""
    zoo = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
    zoo.INPUT.MIN_SIZE_TRAIN = (800,)
    made = {"mask_mapper": DatasetMapper(zoo, is_train=True)}
    for name, folder in (("mapper_bbox", "bbox"), ("mapper_segm", "segm")):
        config = ROOT / "configs" / folder / "lsnet_R_50_FPN_1x.yaml"
        cfg = load_config(str(config), ["MODEL.DEVICE", "cpu"], need_data_sets=False)
        made[name] = LSNetDatasetMapper(cfg, is_train=True)
    return made


def map_all(mapper: DatasetMapper, dicts: list[dict]) -> None:
    for record in dicts:
        mapper(record)


KINDS = {"inference": inference, "training": training, "data": data}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("name", choices=["data", *DETECTORS])
    parser.add_argument("--settings", type=json.loads, required=True, help="of the benchmark")
    parsed = parser.parse_args()
    args = argparse.Namespace(**parsed.settings)
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(args.threads)
    print(json.dumps(KINDS[parsed.kind](parsed.name, args)), flush=True)


if __name__ == "__main__":
    main()

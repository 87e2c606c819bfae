"""Measures one thing of one model, or of the data side, and prints it as a line of JSON.

``tools/benchmark.py`` starts it. A process measures once and ends: what an earlier measurement has
left in caches and in memory would count in the next.
"""

import argparse
import contextlib
import json
import statistics
from collections import defaultdict
from pathlib import Path

import cv2
import torch
from data_side import data
from detectors import DETECTORS, build
from detectron2.utils.events import EventStorage
from gauges import CPU, PeakMemory, now, seconds
from inputs import model_inputs
from torch import nn

from lsnet_d2.export import DetectingModule, export_onnx, load_onnx
from lsnet_d2.modeling import LSNet
from lsnet_d2.modeling.blocks import Tower
from lsnet_d2.modeling.head import RefinePredictor

ROOT = Path(__file__).resolve().parents[2]
# What is exported besides the LSNet of the benchmark.
EXPORTED = {"joint": "configs/joint/lsnet_R_50_FPN_1x.yaml"}


def precision(args: argparse.Namespace) -> contextlib.AbstractContextManager:
    """In which convolutions and matrix products are computed."""
    if args.precision == "float32":
        return contextlib.nullcontext()
    device = torch.device(args.device).type
    return torch.autocast(device, dtype=getattr(torch, args.precision))


@torch.inference_mode()
def inference(name: str, args: argparse.Namespace) -> dict:
    """Latency of an image, images a second in a batch, and for LSNet what its stages take."""
    device = torch.device(args.device)
    inputs = model_inputs(args.batch, *args.size)
    model = build(name, args.config_file, inputs[0], device=device)
    with precision(args):
        return timed_inference(model, inputs, args.repeats, device)


def timed_inference(
    model: nn.Module, inputs: list[dict], repeats: int, device: torch.device
) -> dict:
    detections = len(model(inputs[:1])[0]["instances"])
    if isinstance(model, LSNet):
        passes = [stages(model, inputs[:1], device) for _ in range(repeats)]
        result = {
            "inference": statistics.median(sum(times.values()) for times in passes),
            "stages": {name: statistics.median(t[name] for t in passes) for name in passes[0]},
        }
    else:
        result = {"inference": seconds(lambda: model(inputs[:1]), repeats, device)}
    batches = 1  # on a CPU it takes long
    if device.type == "cuda":
        model(inputs)  # it chooses algorithms for each size of a batch
        batches = repeats
    images_per_second = len(inputs) / seconds(lambda: model(inputs), batches, device)
    return {**result, "images_per_second": images_per_second, "detections": detections}


def training(name: str, args: argparse.Namespace) -> dict:
    """Time of a step, and how far the process's memory grows beyond the model's own."""
    device = torch.device(args.device)
    inputs = model_inputs(args.train_batch, *args.train_size)
    model = build(name, args.config_file, inputs[0], device=device).train()
    # Without a learning rate the update costs the same, and every step does the same work.
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.0, momentum=0.9
    )

    def step() -> None:
        with precision(args):
            loss = sum(model(inputs).values())
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    peak = PeakMemory(device)
    with EventStorage():
        step()
        time_of_step = seconds(step, args.repeats, device)
    return {"train_step": time_of_step, "train_memory": peak.growth()}


class StageClock:
    """Times of modules within a forward pass, by hooks.

    Attributes:
        times: seconds by name, summed over calls.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: dict[str, float] = defaultdict(float)
        self._starts: dict[nn.Module, float] = {}
        self._hooks = []

    def watch(self, name: str, module: nn.Module) -> None:
        def start(module: nn.Module, _inputs: tuple) -> None:
            self._starts[module] = now(self.device)

        def end(module: nn.Module, _inputs: tuple, _output: object) -> None:
            self.times[name] += now(self.device) - self._starts.pop(module)

        self._hooks += [
            module.register_forward_pre_hook(start),
            module.register_forward_hook(end),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def stages(model: LSNet, inputs: list[dict], device: torch.device = CPU) -> dict[str, float]:
    """Seconds of the parts of a forward pass, which add up to the whole.

    "backbone" with its pyramid; "towers"; "init": the first vectors; "sampling": making the grid
    and sampling on three levels; "prediction": from samples to classes and refined vectors;
    "postprocessing": all else, from scores to instances, and normalising the image.
    """
    clock = StageClock(device)
    for name, module in (("model", model), ("backbone", model.backbone), ("head", model.head)):
        clock.watch(name, module)
    for module in model.head.modules():
        if isinstance(module, Tower):
            clock.watch("towers", module)
        elif isinstance(module, RefinePredictor):
            clock.watch("predictors", module)
            if module.sample is not None:
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


@torch.inference_mode()
def exported(name: str, args: argparse.Namespace) -> dict:
    """Latency of an image in ONNX Runtime and in PyTorch, of one model on the CPU."""
    config_file = args.config_file if name == "lsnet" else str(ROOT / EXPORTED[name])
    (image,) = model_inputs(1, *args.size)
    model = build("lsnet", config_file, image)
    module = DetectingModule(model)
    run = load_onnx(export_onnx(model, {}), threads=args.threads)
    result = {}
    for key, function in (("onnx", run), ("pytorch", module)):
        function(image["image"])
        result[key] = seconds(lambda f=function: f(image["image"]), args.repeats)
    return result


KINDS = {
    "inference": inference,
    "training": training,
    "exported": exported,
    "data": lambda _name, args: data(args.repeats),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("name", choices=["data", *DETECTORS, *EXPORTED])
    parser.add_argument("--settings", type=json.loads, required=True, help="of the benchmark")
    parsed = parser.parse_args()
    args = argparse.Namespace(**parsed.settings)
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(args.threads)
    print(json.dumps(KINDS[parsed.kind](parsed.name, args)), flush=True)


if __name__ == "__main__":
    main()

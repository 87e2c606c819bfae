#!/usr/bin/env python
"""LSNet's speed and memory, beside a straight port of it and Detectron2's own models.

Every measurement has a process of its own, and the models take turns over several rounds. A table,
a chart and all figures are written to the output folder. What is measured, and how to read it:
docs/benchmark.md. Run it on an otherwise idle machine.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lsnet_d2.errors import UserError, exit_on_user_error
from lsnet_d2.files import atomic_write, make_folder

ROOT = Path(__file__).resolve().parent.parent
MEASURE = ROOT / "projects/benchmark/measure.py"

# What the tables call the models, in the order in which they take turns.
MODELS = {
    "lsnet": "LSNet",
    "lsnet_conv_tower": "LSNet, plain towers",
    "straight_port": "LSNet, straight port",
    "retinanet": "RetinaNet",
    "fcos": "FCOS",
    "mask_rcnn": "Mask R-CNN",
    "keypoint_rcnn": "Keypoint R-CNN",
}
# Ours in the names of ratios, which are ours over another: less is better.
OURS = {"lsnet": "", "lsnet_conv_tower": "_conv_tower"}
# Models that are exported to ONNX.
EXPORTED = {"lsnet": "LSNet", "joint": "joint LSNet"}
METRICS = ("inference", "train_step", "train_memory")
DATA_RATIOS = (
    ("rle", "bitmaps"),
    ("mapper_bbox", "mask_mapper"),
    ("mapper_segm", "mask_mapper"),
    ("targets_1000", "targets_10"),
    ("evaluation", "pycocotools"),
)

# From settings, kind of measurement and model to figures; see projects/benchmark/measure.py.
Measure = Callable[[dict, str, str], dict]


def measure(settings: dict, kind: str, name: str) -> dict:
    """The figures of a measurement in a process of its own.

    Raises:
        UserError: the process failed; names the model.
    """
    command = [sys.executable, str(MEASURE), kind, name, "--settings", json.dumps(settings)]
    threads = {f"{library}_NUM_THREADS": str(settings["threads"]) for library in ("OMP", "MKL")}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if settings["device"] == "cpu" else {}
    process = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **threads, **hidden, "PYTHONPATH": path},
    )
    title = MODELS.get(name, name)
    if process.returncode:
        lines = process.stderr.strip().splitlines() or ["it said nothing"]
        raise UserError(f"{title}, {kind}: ended with status {process.returncode}: {lines[-1]}")
    return json.loads(process.stdout.splitlines()[-1])


def run_rounds(settings: dict, run: Measure = measure) -> list[dict[str, dict]]:
    """The figures of each round, by model; on the CPU under "data" those of data and evaluation,
    and under "exported" those of models in ONNX Runtime."""
    rounds = []
    for number in range(1, settings["rounds"] + 1):
        figures: dict[str, dict] = {name: {} for name in settings["models"]}
        for kind in ("inference", "training"):
            for name in settings["models"]:
                say(f"round {number} of {settings['rounds']}: {kind}, {MODELS[name]}")
                figures[name] |= run(settings, kind, name)
        if settings["device"] == "cpu":
            say(f"round {number} of {settings['rounds']}: data")
            figures["data"] = run(settings, "data", "data")
            figures["exported"] = {}
            for name in EXPORTED:
                say(f"round {number} of {settings['rounds']}: ONNX Runtime, {EXPORTED[name]}")
                figures["exported"][name] = run(settings, "exported", name)
        rounds.append(figures)
    return rounds


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def medians(figures: list[dict]) -> dict:
    """Medians of figures with the same, possibly nested, keys."""
    return {
        key: (
            medians([f[key] for f in figures])
            if isinstance(value, dict)
            else statistics.median(f[key] for f in figures)
        )
        for key, value in figures[0].items()
    }


def ratios(figures: dict[str, dict]) -> dict[str, float]:
    """Ours over the others' in one round, as far as the models are there."""
    found = {}
    for name, suffix in OURS.items():
        for other in figures.keys() - OURS.keys() - {"data", "exported"} if name in figures else ():
            for metric in METRICS:
                value = figures[name][metric] / figures[other][metric]
                found[f"{metric}{suffix}/{other}"] = value
    for ours, other in DATA_RATIOS if "data" in figures else ():
        found[f"{ours}/{other}"] = figures["data"][ours] / figures["data"][other]
    for name, times in figures.get("exported", {}).items():
        found[f"onnx/pytorch, {name}"] = times["onnx"] / times["pytorch"]
    return dict(sorted(found.items()))


def summarize(rounds: list[dict[str, dict]]) -> dict:
    """Medians over rounds. A ratio is the median of each round's: what slows down a whole round
    does not count."""
    summary = medians(rounds)
    rest = {key: summary.pop(key, {}) for key in ("data", "exported")}
    return {"models": summary, **rest, "ratios": medians([ratios(r) for r in rounds])}


def tables(summary: dict) -> str:
    """Markdown."""
    models = summary["models"]
    lines = [
        "| model | seconds an image | images a second | seconds a training step | "
        "memory of the step, MB | detections |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in models.items():
        lines.append(
            f"| {MODELS[name]} | {row['inference']:.3g} | {row['images_per_second']:.3g} | "
            f"{row['train_step']:.3g} | {row['train_memory'] / 1e6:.0f} | {row['detections']:.0f} |"
        )
    staged = {name: row["stages"] for name, row in models.items() if "stages" in row}
    if staged:
        stages = next(iter(staged.values()))
        lines += ["", f"| seconds of | {' | '.join(stages)} |", "| --- " * (len(stages) + 1) + "|"]
        for name, row in staged.items():
            cells = " | ".join(f"{value:.4f}" for value in row.values())
            lines.append(f"| {MODELS[name]} | {cells} |")
    if data := dict(summary["data"]):
        targets_memory = data.pop("targets_memory")
        lines += ["", "| data and evaluation | ms |", "| --- | --- |"]
        lines += [f"| {name} | {1000 * value:.1f} |" for name, value in data.items()]
        lines += ["", f"Targets of 1,000 objects take at most {targets_memory / 1e6:.0f} MB more."]
    if exported := summary["exported"]:
        lines += ["", "| seconds an image | ONNX Runtime | PyTorch |", "| --- | --- | --- |"]
        for name, times in exported.items():
            lines.append(f"| {EXPORTED[name]} | {times['onnx']:.3g} | {times['pytorch']:.3g} |")
    lines += ["", "| ratio | |", "| --- | --- |"]
    lines += [f"| {name} | {value:.2f} |" for name, value in summary["ratios"].items()]
    return "\n".join(lines) + "\n"


def draw_chart(summary: dict, path: Path, caption: str) -> None:
    """Bars of each model: an image, a training step, its memory."""
    import matplotlib.pyplot as plt  # not needed by --help

    models = summary["models"]
    titles = [MODELS[name] for name in models]
    colours = ["tab:blue" if name in OURS else "tab:gray" for name in models]
    panels = {
        "inference": ("seconds an image", 1.0),
        "train_step": ("seconds a training step", 1.0),
        "train_memory": ("memory of the step, GB", 1e9),
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 1 + 0.4 * len(models)), sharey=True)
    for axis, (metric, (label, unit)) in zip(axes, panels.items(), strict=True):
        values = [row[metric] / unit for row in models.values()]
        axis.bar_label(axis.barh(titles, values, color=colours), fmt="%.3g", padding=2)
        axis.set_xlabel(label)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.suptitle(caption, fontsize=9)
    figure.tight_layout()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)


def machine(device: str) -> dict:
    """What the figures depend on besides the settings."""
    import torch

    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    cpu = names[0] if names else platform.machine()
    return {
        "cpu": cpu,
        "device": cpu if device == "cpu" else torch.cuda.get_device_name(device),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write_report(output: Path, settings: dict, host: dict, rounds: list[dict]) -> str:
    """``bench.json``, ``bench.png`` and ``bench.md``; returns the text of the last."""
    summary = summarize(rounds)
    height, width = settings["size"]
    train_height, train_width = settings["train_size"]
    caption = (
        f"{width} x {height}; training {settings['train_batch']} of {train_width} x "
        f"{train_height}; {settings['precision']}; {host['device']}, "
        f"{settings['threads']} threads, torch {host['torch']}"
    )
    text = f"{tables(summary)}\n{caption}. {time.strftime('%Y-%m-%d')}.\n"
    content = {"settings": settings, "machine": host, **summary, "rounds": rounds}
    draw_chart(summary, output / "bench.png", caption)
    for name, document in (("bench.md", text), ("bench.json", json.dumps(content, indent=1))):
        with atomic_write(output / name, "w") as file:
            file.write(document)
    return text


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    pair = {"nargs": 2, "type": int, "metavar": ("HEIGHT", "WIDTH")}
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=3, help="in which the models take turns")
    parser.add_argument("--repeats", type=int, default=3, help="of what is timed, in each process")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, or auto")
    parser.add_argument(
        "--precision", choices=["float32", "float16", "bfloat16"], default="float32"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--size", default=[800, 1216], help="of images to detect in", **pair)
    parser.add_argument("--batch", type=int, default=4, help="images, for images a second")
    parser.add_argument("--train-size", default=[480, 640], help="of images to train on", **pair)
    parser.add_argument("--train-batch", type=int, default=2)
    parser.add_argument(
        "--config-file",
        default=str(ROOT / "configs/bbox/lsnet_R_50_FPN_1x.yaml"),
        help="of the LSNet",
    )
    parser.add_argument("--output", type=Path, default=ROOT / "output/bench", help="folder")
    return parser


def check_settings(settings: dict) -> None:
    for key, value in settings.items():
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, int) and number < 1 for number in numbers):
            raise UserError(f"--{key.replace('_', '-')}: must be 1 or more, not {value}")


def find_device(name: str) -> str:
    """
    Raises:
        UserError: it is not here, or none whose time and memory can be measured.
    """
    from lsnet_d2.config_file import resolve_device  # not needed by --help

    device = resolve_device(name)
    if device.partition(":")[0] != "cuda" and device != "cpu":
        raise UserError(f"--device is {name!r}; it must be cpu, cuda or auto")
    return device


@exit_on_user_error()
def main() -> None:
    settings = vars(get_parser().parse_args())
    output = settings.pop("output")
    settings["config_file"] = os.path.abspath(settings["config_file"])
    check_settings(settings)
    settings["device"] = find_device(settings["device"])
    make_folder(output)
    host = machine(settings["device"])
    if host["load"] > 0.5:
        say(f"the load of this machine is {host['load']:.1f}: figures will be of little worth")
    print(write_report(output, settings, host, run_rounds(settings)))


if __name__ == "__main__":
    main()

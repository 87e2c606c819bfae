"""The modules of projects/recipes, which are scripts beside one another and no package, and
trainings faked for their tests."""

import importlib
import json
from pathlib import Path

import pytest
from tiny_coco import ROOT

FOLDER = ROOT / "projects" / "recipes"

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(FOLDER))
    # "train" and the like are common names: none is left behind for other tests
    compare = importlib.import_module("compare")
    curves = importlib.import_module("curves")
    folders = importlib.import_module("folders")
    launcher = importlib.import_module("launcher")
    pictures = importlib.import_module("pictures")
    plan = importlib.import_module("plan")
    report = importlib.import_module("report")
    rows = importlib.import_module("rows")
    runs = importlib.import_module("runs")
    timings = importlib.import_module("timings")
    train = importlib.import_module("train")
    versions = importlib.import_module("versions")

SHAPES = ROOT / "configs/quick"
VERSION = versions.Version(
    code=versions.code_hash(), torch="2", detectron2="0.6", device="chip", commit="abc"
)


class FakeTraining:
    """Takes half a second an iteration, a quarter if it is an R-CNN; AP is 1000 times the learning
    rate plus the seed. It diverges with a rate above 0.1."""

    commands: list[dict]
    status = 0

    def __init__(self, command, **_):
        words = command[command.index("--config-file") :]
        options = dict(zip(words[::2], words[1::2], strict=True))
        self.commands.append(options)
        iterations = int(options["SOLVER.MAX_ITER"])
        rate = float(options.get("SOLVER.BASE_LR", 0.01))
        self.returncode = train.DIVERGED if rate > 0.1 else self.status
        if self.returncode:
            return
        seconds = 0.25 if "rcnn" in options["--config-file"] else 0.5
        lines = [{"time": 60.0, "iteration": 0, "peak_memory": 100.0}]  # warming up
        lines += [{"time": seconds, "iteration": iterations - 1, "peak_memory": 200.0}]
        lines[-1]["parameters"] = 3e6
        if options.get("DATASETS.TEST") != "()":
            ap = 1000 * rate + int(options["SEED"])
            lines.append({"iteration": iterations, "bbox/AP": ap, "bbox/APl": float("nan")})
        with open(Path(options["OUTPUT_DIR"]) / "metrics.json", "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def wait(self):
        return self.returncode

    def terminate(self):
        pass


def variant(name="LSNet", config="shapes_bbox", **kwargs):
    values = {"group": "bbox", "name": name, "config": SHAPES / f"{config}.yaml", "opts": {}}
    return plan.Variant(**{**values, **kwargs})


def train_all(output, *variants, seeds=(1,), **kwargs):
    trainings = runs.Trainings(
        output, kwargs.pop("version", VERSION), opts=["MODEL.DEVICE", "cpu"], **kwargs
    )
    comparison = compare.Comparison(trainings, variants, seeds)
    trainings.prepare(variants)
    comparison.run()
    comparison.report()
    return comparison

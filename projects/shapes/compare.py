#!/usr/bin/env python
"""LSNet beside Detectron2's RetinaNet, Mask R-CNN and Keypoint R-CNN on the shapes.

All have the same backbone, data, image size and batches, and are trained for the same time: LSNet
as its config says, the others for as many iterations as fit, which a short run finds out. Run it
on an otherwise idle machine. Finished runs are kept; a second call goes on.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from lsnet_d2.files import atomic_write

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs/quick"
TIMING_ITERATIONS = 60

# Task -> what is trained for as long as LSNet.
RIVALS = {
    "bbox": {"RetinaNet": "shapes_retinanet"},
    "segm": {"Mask R-CNN": "shapes_mask_rcnn"},
    "pose_bbox": {"Keypoint R-CNN": "shapes_keypoint_rcnn"},
    "pose_kbox": {},
    "joint": {"Mask R-CNN": "shapes_mask_rcnn", "Keypoint R-CNN": "shapes_keypoint_rcnn"},
}
KINDS = {"bbox": "boxes", "segm": "masks", "keypoints": "keypoints"}
FIGURES = ["AP", "AP50", "AP75", "APs", "APm"]


@dataclass
class Row:
    """One trained model.

    Attributes:
        name: what the tables call it.
        iterations: length of training.
        seconds: time of training, without evaluation.
        scores: COCO's figures in percent, by kind and name as in "bbox/AP".
    """

    name: str
    iterations: int
    seconds: float
    scores: dict[str, float | None]


def train(name: str, config: str, output: Path, seed: int, *opts: str) -> Row:
    """Train and evaluate in a process of its own, or read what an earlier call left.

    ``row.json`` in ``output`` says that a run is finished; without it the folder is made anew.
    """
    report = output / "row.json"
    if not report.exists():
        command = [sys.executable, str(ROOT / "tools/train_net.py")]
        command += ["--config-file", str(CONFIGS / f"{config}.yaml")]
        command += ["SEED", str(seed), "OUTPUT_DIR", str(output), *opts]
        if output.exists():  # cut off: its figures would be mixed with the new ones
            shutil.rmtree(output)
        print(f"{name}, seed {seed}: log in {output}/log.txt", flush=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        with atomic_write(report, "w") as file:
            json.dump(asdict(read_row(name, output)), file)
    return Row(**json.loads(report.read_text()))


def read_row(name: str, output: Path) -> Row:
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    step = statistics.median(line["time"] for line in lines if "time" in line)
    iterations = max(line["iteration"] for line in lines if "time" in line) + 1
    scores = {
        key: value if value == value else None  # NaN: there are no such objects
        for key, value in lines[-1].items()
        if key.split("/")[0] in KINDS and key.split("/")[-1] in FIGURES
    }
    return Row(name, iterations, step * iterations, scores)


def train_all(tasks: list[str], seed: int, folder: Path) -> list[Row]:
    rows = []
    for task in tasks:
        ours = train(f"LSNet {task}", f"shapes_{task}", folder / task, seed)
        rows.append(ours)
        for name, config in RIVALS[task].items():
            timing = train(
                f"timing of {name}",
                config,
                folder / f"{config}_timing",
                seed,
                *("SOLVER.MAX_ITER", str(TIMING_ITERATIONS), "DATASETS.TEST", "()"),
            )
            iterations = round(ours.seconds / timing.seconds * timing.iterations)
            title = f"{name}, as long as {task}"
            output = folder / f"{config}_{task}"
            rows.append(train(title, config, output, seed, "SOLVER.MAX_ITER", str(iterations)))
    return rows


def tables(rows: list[Row]) -> str:
    """Markdown, a table for each kind: means over seeds, and the spread (largest minus smallest)
    of AP."""
    text = []
    for kind, title in KINDS.items():
        known = [row for row in rows if f"{kind}/AP" in row.scores]
        if not known:
            continue
        text += [
            f"| {title} | iterations | minutes | AP | spread | AP50 | AP75 | APs | APm |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for name in dict.fromkeys(row.name for row in known):
            runs = [row for row in known if row.name == name]
            aps = [run.scores[f"{kind}/AP"] for run in runs]
            cells = [
                name,
                f"{statistics.mean(run.iterations for run in runs):,.0f}",
                f"{statistics.mean(run.seconds for run in runs) / 60:.1f}",
                mean(aps),
                f"{max(aps) - min(aps):.1f}" if len(aps) > 1 else "",
                *(mean([run.scores.get(f"{kind}/{key}") for run in runs]) for key in FIGURES[1:]),
            ]
            text.append(f"| {' | '.join(cells)} |")
        text.append("")
    return "\n".join(text)


def mean(values: list[float | None]) -> str:
    return "" if None in values else f"{statistics.mean(values):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=list(RIVALS), choices=list(RIVALS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--output", type=Path, default=ROOT / "output/shapes_compare")
    args = parser.parse_args()

    rows = [
        row for seed in args.seeds for row in train_all(args.tasks, seed, args.output / str(seed))
    ]
    text = f"{tables(rows)}\nSeeds {args.seeds}, {time.strftime('%Y-%m-%d')}.\n"
    (args.output / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

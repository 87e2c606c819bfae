#!/usr/bin/env python
"""LSNet beside Detectron2's RetinaNet on the shapes: same backbone, data, image size and schedule.

RetinaNet is trained twice for each seed: for as many iterations as LSNet, and for as long. Run on
an otherwise idle machine, since times count. Finished runs are kept; a second call goes on.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from lsnet_d2.files import atomic_write

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ["AP", "AP50", "AP75", "APs", "APm"]


@dataclass
class Row:
    """One trained model.

    Attributes:
        name: what the table calls it.
        iterations: length of training.
        seconds: time of training, without evaluation.
        scores: COCO's figures for boxes, in percent.
    """

    name: str
    iterations: int
    seconds: float
    scores: dict[str, float]


def train(name: str, config: str, iterations: int, seed: int, output: Path) -> Row:
    """Train and evaluate in a process of its own, or read what an earlier call left.

    ``row.json`` in ``output`` says that a run is finished; without it the folder is made anew.
    """
    report = output / "row.json"
    if not report.exists():
        command = [sys.executable, str(ROOT / "tools/train_net.py")]
        command += ["--config-file", str(ROOT / f"configs/quick/{config}.yaml")]
        command += ["SOLVER.MAX_ITER", str(iterations), "SEED", str(seed)]
        command += ["OUTPUT_DIR", str(output)]
        if output.exists():  # cut off: its figures would be mixed with the new ones
            shutil.rmtree(output)
        print(f"{name}, seed {seed}, {iterations} iterations: log in {output}/log.txt", flush=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        with atomic_write(report, "w") as file:
            json.dump(vars(read_row(name, iterations, output)), file)
    return Row(**json.loads(report.read_text()))


def read_row(name: str, iterations: int, output: Path) -> Row:
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    seconds = statistics.median(line["time"] for line in lines if "time" in line) * iterations
    final = next(line for line in reversed(lines) if "bbox/AP" in line)
    return Row(name, iterations, seconds, {key: final[f"bbox/{key}"] for key in FIGURES})


def table(rows: list[Row]) -> str:
    """Markdown: mean over seeds, and the spread (largest minus smallest) of AP."""
    lines = [
        "| model | iterations | minutes | AP | spread | AP50 | AP75 | APs | APm |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(row.name for row in rows):
        runs = [row for row in rows if row.name == name]
        mean = {key: statistics.mean(run.scores[key] for run in runs) for key in FIGURES}
        aps = [run.scores["AP"] for run in runs]
        cells = [
            name,
            f"{statistics.mean(run.iterations for run in runs):.0f}",
            f"{statistics.mean(run.seconds for run in runs) / 60:.1f}",
            f"{mean['AP']:.1f}",
            f"{max(aps) - min(aps):.1f}" if len(aps) > 1 else "one seed",
            *(f"{mean[key]:.1f}" for key in FIGURES[1:]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--iterations", type=int, default=1450)
    parser.add_argument("--output", type=Path, default=ROOT / "output/shapes_compare")
    args = parser.parse_args()

    rows = []
    for seed in args.seeds:
        folder = args.output / f"{args.iterations}_seed{seed}"
        ours = train("LSNet", "shapes_bbox", args.iterations, seed, folder / "lsnet")
        rows.append(ours)
        name = "RetinaNet, same iterations"
        same = train(name, "shapes_retinanet", args.iterations, seed, folder / "retinanet")
        rows.append(same)
        iterations = round(args.iterations * ours.seconds / same.seconds)
        name = "RetinaNet, same time"
        rows.append(train(name, "shapes_retinanet", iterations, seed, folder / "retinanet_time"))

    text = f"{table(rows)}\n\nSeeds {args.seeds}, {time.strftime('%Y-%m-%d')}.\n"
    (args.output / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

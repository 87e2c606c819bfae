"""What a training leaves: its row of a table, and the metrics that the row is made from."""

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lsnet_d2.errors import UserError

KINDS = ("bbox", "segm", "keypoints")
FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One training that has ended.

    Attributes:
        group, name, point: the variant, and its place in the grid.
        seed: of the training.
        diverged: whether it ended because its numbers were none any more; it has no scores then.
        iterations: of the training.
        step_seconds: mean time of an iteration, evaluation apart; None: it ended too early.
        peak_memory: MiB, see ``train.py``.
        jobs: trainings that ran at once; only of one the time means something.
        scores: COCO's figures in percent by kind and name, as in "bbox/AP"; None where there are
            no such objects, or nothing was found at all.
        version: of :class:`versions.Version`, with its key.
        folder: of its files.
        parameters: of the model, frozen ones too; None: it ended too early.
    """

    group: str
    name: str
    point: dict[str, str]
    seed: int
    diverged: bool
    iterations: int
    step_seconds: float | None
    peak_memory: float | None
    jobs: int
    scores: dict[str, float | None]
    version: dict[str, str]
    folder: str
    parameters: float | None = None


def read_row(path: Path) -> Row:
    return Row(**json.loads(path.read_text()))


def title_of(name: str, point: Mapping[str, str]) -> str:
    """What tables call a variant at a point of its grid."""
    values = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in point.items())
    return f"{name} ({values})" if values else name


def read_metrics(folder: Path) -> list[dict]:
    """The lines of ``metrics.json`` by iteration. Of a training that was cut off and went on some
    were written twice: the later ones count."""
    path = folder / "metrics.json"
    by_iteration: dict[int, dict] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            values = json.loads(line)
        except ValueError:  # cut off while it was written
            continue
        by_iteration.setdefault(values["iteration"], {}).update(values)
    return [by_iteration[iteration] for iteration in sorted(by_iteration)]


def step_seconds(metrics: list[dict]) -> float | None:
    """Mean of the medians of 20 iterations each, without the first, in which all is warmed up."""
    times = [line["time"] for line in metrics if "time" in line]
    return statistics.mean(times[1:] or times) if times else None


def final_scores(metrics: list[dict], iterations: int, folder: Path) -> dict[str, float | None]:
    """Figures of the evaluation at the end. NaN, where there is nothing to score, becomes None.

    Raises:
        UserError: there is no such evaluation.
    """
    last = metrics[-1] if metrics else {}
    scores = {
        f"{kind}/{figure}": value if math.isfinite(value) else None
        for kind in KINDS
        for figure in FIGURES
        if (value := last.get(f"{kind}/{figure}")) is not None
    }
    if not scores or last["iteration"] < iterations - 1:
        raise UserError(f"{folder}/metrics.json has no evaluation at the end of the training")
    return scores

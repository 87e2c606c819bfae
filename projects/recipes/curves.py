"""Loss and AP over the time of training, as a picture."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from plan import slug
from report import TITLES
from rows import KINDS, Row, read_metrics, title_of

from lsnet_d2.files import atomic_write

matplotlib.use("Agg")

import matplotlib.pyplot as plt


def curve(metrics: list[dict], key: str, unit: float) -> tuple[list[float], list[float]]:
    """Where a metric is known, in iterations times ``unit``, and its values; NaN is not drawn."""
    lines = [line for line in metrics if key in line]
    return [line["iteration"] * unit for line in lines], [line[key] for line in lines]


def draw_curves(rows: Sequence[Row], output: Path) -> list[Path]:
    """For each group a picture ``curves_{group}.png``: the loss, and AP of each kind, of the first
    seed of each row. Losses of different models are not comparable, only their shapes.

    The x-axis is time, or the share of the training where several ran at once.

    Args:
        rows: that have ended; ``folder`` is below ``output``.
    """
    written = []
    for group in dict.fromkeys(row.group for row in rows):
        first: dict[str, Row] = {}
        for row in rows:
            if row.group == group and row.step_seconds:
                first.setdefault(title_of(row.name, row.point), row)
        alone = all(row.jobs == 1 for row in first.values())
        metrics = {name: read_metrics(output / row.folder) for name, row in first.items()}
        panels = {"total_loss": "loss, median of 20 iterations"} | {
            f"{kind}/AP": f"AP of {TITLES[kind]}"
            for kind in KINDS
            if any(f"{kind}/AP" in line for lines in metrics.values() for line in lines)
        }
        figure, axes = plt.subplots(
            1, len(panels), figsize=(4.5 * len(panels), 3.6), layout="constrained", squeeze=False
        )
        for axis, (key, title) in zip(axes[0], panels.items(), strict=True):
            for index, (name, row) in enumerate(first.items()):
                unit = row.step_seconds / 60 if alone else 1 / row.iterations
                x, y = curve(metrics[name], key, unit)
                marker = "" if key == "total_loss" else "o"
                axis.plot(x, y, marker=marker, color=f"C{index}", label=f"{name}, seed {row.seed}")
            axis.set(title=title, xlabel="minutes of training" if alone else "share of training")
            axis.grid(alpha=0.3)
        axes[0][0].set_yscale("log")
        axes[0][-1].legend(fontsize="small")
        path = output / f"curves_{slug(group)}.png"
        with atomic_write(path) as file:
            figure.savefig(file, format="png", dpi=120)
        plt.close(figure)
        written.append(path)
    return written

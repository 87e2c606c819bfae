"""How long an iteration takes, measured by short runs of nothing else."""

import json
import os
import shutil
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

from launcher import Launcher, Point, last_words, recipe_name
from plan import Variant
from rows import read_metrics, step_seconds

from lsnet_d2.errors import UserError
from lsnet_d2.files import atomic_write
from lsnet_d2.solver import ITERATION_KEYS

_ROUNDS = 3
# What the time of an iteration does not depend on.
_OPTIMIZER = ("BASE_LR", "BACKBONE_MULTIPLIER", "WEIGHT_DECAY", "WEIGHT_DECAY_NORM", "MOMENTUM")
_TIMELESS = (*ITERATION_KEYS, "TEST.BEST_METRIC", "TEST.PATIENCE") + tuple(
    f"SOLVER.{key}" for key in _OPTIMIZER
)


class NotTimedError(Exception):
    """The time of an iteration is not known."""


class Timings:
    """Measures iterations; what has been measured is kept, one file each."""

    def __init__(
        self, folder: Path, launcher: Launcher, iterations: int, say: Callable[[str], None]
    ) -> None:
        """
        Args:
            folder: for the files.
            iterations: of each short run.
            say: told what is going on.
        """
        self.folder = folder
        self.launcher = launcher
        self.iterations = iterations
        self.say = say

    def seconds(self, variant: Variant, point: Point) -> float:
        """
        Raises:
            NotTimedError: :meth:`measure` was not asked for this one.
        """
        report = self._report(variant, point)
        if not report.exists():
            raise NotTimedError
        return json.loads(report.read_text())["seconds"]

    def measure(self, wanted: Iterable[tuple[Variant, Point]]) -> None:
        """Make the short runs that are missing.

        All take turns, several times, and medians count: a slow minute of the machine then makes
        none slower than the others.

        Raises:
            UserError: a short run failed.
        """
        missing: dict[Path, tuple[Variant, Point]] = {}
        for variant, point in wanted:
            report = self._report(variant, point)
            if not report.exists():
                missing.setdefault(report, (variant, point))
        load = os.getloadavg()[0]
        rounds = [
            {
                report: self._short_run(variant, point, report.with_suffix(""), number)
                for report, (variant, point) in missing.items()
            }
            for number in range(1, _ROUNDS + 1)
        ]
        for report in missing:
            seconds = [times[report] for times in rounds]
            values = {"seconds": statistics.median(seconds), "rounds": seconds, "load": load}
            with atomic_write(report, "w") as file:
                json.dump(values, file)

    def _report(self, variant: Variant, point: Point) -> Path:
        cfg = self.launcher.config(variant, point)
        return self.folder / f"{recipe_name(variant, cfg, _TIMELESS)}.json"

    def _short_run(self, variant: Variant, point: Point, folder: Path, number: int) -> float:
        """Seconds of an iteration.

        Args:
            folder: to use meanwhile.
            number: of the round, and the seed.
        """
        self.say(
            f"{variant.group}: {variant.name}: timing {self.iterations} iterations, round "
            f"{number} of {_ROUNDS}"
        )
        shutil.rmtree(folder, ignore_errors=True)
        opts = self.launcher.schedule(variant, point, self.iterations, evaluations=0)
        status = self.launcher.run(
            variant, point, folder, seed=number, opts=[*opts, "DATASETS.TEST", "()"]
        )
        seconds = step_seconds(read_metrics(folder))
        if status or not seconds:
            raise UserError(f"{variant.group}: {variant.name}: {last_words(folder)}")
        shutil.rmtree(folder)
        return seconds

"""The trainings of a comparison: how long, in which folder, and what came out.

Below the output folder, ``{version}/{group}_{name}-{hash}/seed{n}/`` is the folder of a training.
The version is that of the code, the libraries and the device, the hash that of the config with all
that was changed in it, its length included, and of the annotation files that it names. So what is
found under a name was made by this recipe, and a recipe or code that changes starts anew beside it.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from launcher import Launcher, Point, last_words, recipe_name
from plan import Variant
from rows import Row, final_scores, read_metrics, read_row, step_seconds, title_of
from timings import NotTimedError, Timings
from train import DIVERGED
from versions import Version, code_hash

from lsnet_d2.errors import UserError
from lsnet_d2.files import atomic_write, make_folder

Siblings = Mapping[tuple[str, str], Variant]  # by group and name


class Trainings:
    """Trains what a plan has, each in a process of its own, or finds that it has been trained."""

    def __init__(
        self,
        output: Path,
        version: Version,
        *,
        opts: list[str],
        evaluations: int = 1,
        jobs: int = 1,
        timing_iterations: int = 40,
        say: Callable[[str], None] = print,
    ) -> None:
        """
        Args:
            output: folder of the comparison.
            version: of all that is trained.
            opts: keys and values in turn, over those of the variants.
            evaluations: in each training, the last at its end.
            jobs: trainings that run at once.
            timing_iterations: of each of the short runs that measure an iteration.
            say: told what is going on.
        """
        self.output = output
        self.version = version
        self.evaluations = evaluations
        self.jobs = jobs
        self.say = say
        self._launcher = Launcher(opts)
        self._timings = Timings(
            output / version.key / "timings", self._launcher, timing_iterations, say
        )
        self._lengths: dict[tuple, int] = {}

    def prepare(self, variants: tuple[Variant, ...], *, measure: bool = True) -> None:
        """Check all configs, and settle how long is trained.

        Args:
            measure: by one short run after the other, where a budget is a time. False: what has
                not been timed has no rows.

        Raises:
            ConfigError: a config is not valid.
            UserError: a short run failed, or a budget is like that of a variant not chosen.
        """
        points = [(variant, point) for variant in variants for point in variant.points]
        for variant, point in points:
            self._launcher.config(variant, point)
        siblings = {(variant.group, variant.name): variant for variant in variants}
        if measure:
            self._timings.measure(x for xs in points for x in _timed_for(*xs, siblings))
        for variant, point in points:
            with suppress(NotTimedError):
                self._lengths[_key(variant, point)] = self._length(variant, point, siblings)

    def _length(self, variant: Variant, point: Point, siblings: Siblings) -> int:
        budget = variant.budget
        if budget.iterations is not None:
            return budget.iterations
        if budget.minutes is not None:
            seconds = 60 * budget.minutes
        elif budget.like is not None:
            other = _like(variant, siblings)
            seconds = self._length(other, {}, siblings) * self._timings.seconds(other, {})
        else:
            return self._launcher.config(variant, point).SOLVER.MAX_ITER
        return max(round(seconds / self._timings.seconds(variant, point)), 1)

    def folder(self, variant: Variant, point: Point, seed: int) -> Path:
        """Of a training that :meth:`prepare` has settled the length of."""
        cfg = self._launcher.config(variant, point)
        cfg.merge_from_list(self._schedule(variant, point))
        return self.output / self.version.key / recipe_name(variant, cfg) / f"seed{seed}"

    def _schedule(self, variant: Variant, point: Point) -> list[str]:
        iterations = self._lengths[_key(variant, point)]
        return self._launcher.schedule(variant, point, iterations, self.evaluations)

    def find(self, variant: Variant, point: Point, seed: int) -> Row | None:
        """What a finished training has left."""
        if _key(variant, point) not in self._lengths:
            return None
        report = self.folder(variant, point, seed) / "row.json"
        if not report.exists():
            return None
        # The same recipe may have had another name, or another place in a grid.
        names = {"group": variant.group, "name": variant.name, "point": dict(point)}
        return replace(read_row(report), **names)

    def train(self, variant: Variant, point: Point, seed: int) -> Row:
        """Train and evaluate, go on with what was cut off, or read what is finished.

        Raises:
            UserError: the training failed, or the code is not that of the version any more.
        """
        if row := self.find(variant, point, seed):
            return row
        folder = self.folder(variant, point, seed)
        title = f"{variant.group}: {title_of(variant.name, point)}, seed {seed}"
        iterations = self._lengths[_key(variant, point)]
        self._require_same_code()
        self.say(f"{title}: {iterations} iterations, log in {folder}/log.txt")
        jobs = self._note_jobs(folder)
        opts = self._schedule(variant, point)
        status = self._launcher.run(variant, point, folder, seed=seed, opts=opts, jobs=self.jobs)
        if status not in (0, DIVERGED):
            raise UserError(f"{title}: {last_words(folder)}")
        metrics = read_metrics(folder)
        row = Row(
            group=variant.group,
            name=variant.name,
            point=dict(point),
            seed=seed,
            diverged=status == DIVERGED,
            iterations=iterations,
            step_seconds=step_seconds(metrics),
            peak_memory=max(
                (m["peak_memory"] for m in metrics if "peak_memory" in m), default=None
            ),
            jobs=jobs,
            scores={} if status == DIVERGED else final_scores(metrics, iterations, folder),
            version={**asdict(self.version), "key": self.version.key},
            folder=str(folder.relative_to(self.output)),
            parameters=next((m["parameters"] for m in metrics if "parameters" in m), None),
        )
        with atomic_write(folder / "row.json", "w") as file:
            json.dump(asdict(row), file, indent=1)
        for checkpoint in folder.glob("model_[0-9]*.pth"):
            checkpoint.unlink()
        return row

    def _require_same_code(self) -> None:
        if code_hash() != self.version.code:
            raise UserError(
                "the code has changed since this comparison began: start it again; what is "
                "finished stays, and is listed apart"
            )

    def _note_jobs(self, folder: Path) -> int:
        """The most trainings that ran at once in any part of this one."""
        note = make_folder(folder) / "jobs.json"
        jobs = max(self.jobs, json.loads(note.read_text()) if note.exists() else 1)
        with atomic_write(note, "w") as file:
            json.dump(jobs, file)
        return jobs

    def stop(self) -> None:
        """See :meth:`.Launcher.stop`."""
        self._launcher.stop()


def _key(variant: Variant, point: Point) -> tuple:
    return variant.group, variant.name, *point.items()


def _like(variant: Variant, siblings: Siblings) -> Variant:
    """The one whose time a variant gets.

    Raises:
        UserError: it is not among the siblings.
    """
    like = variant.budget.like
    if (variant.group, like) not in siblings:
        raise UserError(
            f"{variant.group}: {variant.name}: its budget is like {like!r}, which is not among the "
            "variants chosen"
        )
    return siblings[variant.group, like]


def _timed_for(variant: Variant, point: Point, siblings: Siblings) -> list[tuple[Variant, Point]]:
    """Whose time of an iteration has to be known to settle the length of a training."""
    if variant.budget.like is not None:
        return [(variant, point), (_like(variant, siblings), {})]
    return [(variant, point)] if variant.budget.minutes is not None else []

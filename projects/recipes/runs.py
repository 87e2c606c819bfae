"""The trainings of a comparison: how long, in which folder, and what came out.

Below the output folder, ``{version}/{group}_{name}-{hash}/seed{n}/`` is the folder of a training.
The version is that of the code, the libraries and the device, the hash that of the config with all
that was changed in it, its length included, and of the annotation files that it names. So what is
found under a name was made by this recipe, and a recipe or code that changes starts anew beside it.
"""

import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from detectron2.config import CfgNode
from plan import ROOT, Variant, slug
from train import DIVERGED
from versions import Version, code_hash

from lsnet_d2.config_file import load_config
from lsnet_d2.errors import ConfigError, UserError
from lsnet_d2.files import atomic_write, make_folder
from lsnet_d2.solver import scale_schedule, schedule_of_length

KINDS = ("bbox", "segm", "keypoints")
FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl")

# Not part of what a run is.
_OF_THE_RUN = ("SEED", "OUTPUT_DIR")
# What the time of a step does not depend on, besides the schedule.
_TIMELESS = tuple(
    f"SOLVER.{key}"
    for key in ("BASE_LR", "BACKBONE_MULTIPLIER", "WEIGHT_DECAY", "WEIGHT_DECAY_NORM", "MOMENTUM")
)
_SCHEDULE = (
    *("SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.WARMUP_ITERS", "SOLVER.CHECKPOINT_PERIOD"),
    *("TEST.EVAL_PERIOD", "TEST.BEST_METRIC", "TEST.PATIENCE"),
)

Point = Mapping[str, str]
Siblings = Mapping[tuple[str, str], Variant]  # by group and name

_TIMING_ROUNDS = 3


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


class _NotTimedError(Exception):
    """How many iterations a time gives is not known."""


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
        timing_iterations: int | None = 40,
        say: Callable[[str], None] = print,
    ) -> None:
        """
        Args:
            output: folder of the comparison.
            version: of all that is trained.
            opts: keys and values in turn, over those of the variants.
            evaluations: in each training, the last at its end.
            jobs: trainings that run at once.
            timing_iterations: of each of the short runs that measure an iteration. None: none are
                made, and what has not been timed has no rows.
            say: told what is going on.
        """
        self.output = output
        self.version = version
        self.opts = opts
        self.evaluations = evaluations
        self.jobs = jobs
        self.timing_iterations = timing_iterations
        self.say = say
        self._lengths: dict[tuple, int] = {}
        self._processes: set[subprocess.Popen] = set()
        self._stopped = False
        self._starting = threading.Lock()  # none may start unseen while all are stopped

    def prepare(self, variants: tuple[Variant, ...]) -> None:
        """Check all configs, and settle how long is trained: one short run after the other.

        Raises:
            ConfigError: a config is not valid.
            UserError: a short run failed, or a budget is like that of a variant not chosen.
        """
        points = [(variant, point) for variant in variants for point in variant.points]
        for variant, point in points:
            self.config(variant, point)
        siblings = {(variant.group, variant.name): variant for variant in variants}
        if self.timing_iterations is not None:
            self._time([step for x in points for step in _steps_of_budget(*x, siblings)])
        for variant, point in points:
            with suppress(_NotTimedError):
                self._lengths[_key(variant, point)] = self._length(variant, point, siblings)

    def config(self, variant: Variant, point: Point) -> CfgNode:
        """The checked config of a variant at a point of its grid, before its length is set."""
        opts = self._opts(variant, point)
        try:
            cfg = load_config(str(variant.config), opts)
        except ConfigError as error:
            raise ConfigError(f"{variant.group}: {variant.name}: {error}") from error
        if len(cfg.DATASETS.TEST) != 1:
            raise ConfigError(
                f"{variant.group}: {variant.name}: DATASETS.TEST is {cfg.DATASETS.TEST}; a table "
                "has the figures of one data set"
            )
        scale_schedule(cfg, given=opts[::2])
        return cfg

    def _opts(self, variant: Variant, point: Point) -> list[str]:
        pairs = {**variant.opts, **point, **dict(zip(self.opts[::2], self.opts[1::2], strict=True))}
        return [word for pair in pairs.items() for word in pair]

    def _length(self, variant: Variant, point: Point, siblings: Siblings) -> int:
        budget = variant.budget
        if budget.iterations is not None:
            return budget.iterations
        if budget.minutes is not None:
            seconds = 60 * budget.minutes
        elif budget.like is not None:
            other = _like(variant, siblings)
            seconds = self._length(other, {}, siblings) * self.seconds_of_step(other, {})
        else:
            return self.config(variant, point).SOLVER.MAX_ITER
        return max(round(seconds / self.seconds_of_step(variant, point)), 1)

    def seconds_of_step(self, variant: Variant, point: Point) -> float:
        """Of the short runs made by :meth:`prepare`.

        Raises:
            _NotTimedError: they have not been made.
        """
        report = self._timing_report(variant, point)
        if not report.exists():
            raise _NotTimedError
        return json.loads(report.read_text())["seconds"]

    def _timing_report(self, variant: Variant, point: Point) -> Path:
        digest = _hash(self.config(variant, point), without=(*_TIMELESS, *_SCHEDULE))
        name = _folder_name(variant, digest)
        return self.output / self.version.key / "timings" / f"{name}.json"

    def _time(self, steps: list[tuple[Variant, Point]]) -> None:
        """Make the short runs that are missing, with nothing beside them.

        All take turns, several times, and medians count: a slow minute of the machine then makes
        none slower than the others.

        Raises:
            UserError: a short run failed.
        """
        missing: dict[Path, tuple[Variant, Point]] = {}
        for step in steps:
            report = self._timing_report(*step)
            if not report.exists():
                missing.setdefault(report, step)
        load = os.getloadavg()[0]
        rounds = [
            {
                report: self._short_run(variant, point, report.with_suffix(""), number)
                for report, (variant, point) in missing.items()
            }
            for number in range(1, _TIMING_ROUNDS + 1)
        ]
        for report in missing:
            seconds = [times[report] for times in rounds]
            values = {"seconds": statistics.median(seconds), "rounds": seconds, "load": load}
            with atomic_write(report, "w") as file:
                json.dump(values, file)

    def _short_run(self, variant: Variant, point: Point, folder: Path, number: int) -> float:
        """Seconds of an iteration.

        Args:
            folder: to use meanwhile.
            number: of the round, and the seed.
        """
        self.say(
            f"{variant.group}: {variant.name}: timing {self.timing_iterations} iterations, round "
            f"{number} of {_TIMING_ROUNDS}"
        )
        shutil.rmtree(folder, ignore_errors=True)
        schedule = schedule_of_length(self.config(variant, point), self.timing_iterations)
        opts = [*_words({**schedule, **_evaluations(0)}), "DATASETS.TEST", "()"]
        status = self._run(variant, point, folder, seed=number, opts=opts, jobs=1)
        seconds = step_seconds(read_metrics(folder))
        if status or not seconds:
            raise UserError(f"{variant.group}: {variant.name}: {_last_words(folder)}")
        shutil.rmtree(folder)
        return seconds

    def folder(self, variant: Variant, point: Point, seed: int) -> Path:
        """Of a training that :meth:`prepare` has settled the length of."""
        cfg = self.config(variant, point)
        cfg.merge_from_list(self._schedule(cfg, self._lengths[_key(variant, point)]))
        name = _folder_name(variant, _hash(cfg))
        return self.output / self.version.key / name / f"seed{seed}"

    def _schedule(self, cfg: CfgNode, iterations: int) -> list[str]:
        period = math.ceil(iterations / self.evaluations) if self.evaluations > 1 else 0
        return _words({**schedule_of_length(cfg, iterations), **_evaluations(period)})

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
        opts = self._schedule(self.config(variant, point), iterations)
        status = self._run(variant, point, folder, seed=seed, opts=opts, jobs=self.jobs)
        if status not in (0, DIVERGED):
            raise UserError(f"{title}: {_last_words(folder)}")
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

    def _run(
        self, variant: Variant, point: Point, folder: Path, *, seed: int, opts: list[str], jobs: int
    ) -> int:
        """Exit status of a training; what it says on stderr is in ``stderr.txt``.

        Raises:
            UserError: after :meth:`stop`.
        """
        command = [sys.executable, str(Path(__file__).with_name("train.py")), "--resume"]
        command += ["--config-file", str(variant.config), *self._opts(variant, point), *opts]
        command += ["SEED", str(seed), "OUTPUT_DIR", str(folder)]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": path}
        if jobs > 1:
            env["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // jobs, 1))
        with open(make_folder(folder) / "stderr.txt", "w") as stderr, self._starting:
            if self._stopped:
                raise UserError(f"{variant.group}: {variant.name}: stopped before it began")
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=stderr, cwd=ROOT, env=env
            )
            self._processes.add(process)
        try:
            return process.wait()
        finally:
            process.terminate()  # where waiting was interrupted
            self._processes.discard(process)

    def stop(self) -> None:
        """Start nothing more, and end what runs; it goes on from its last checkpoint next time."""
        with self._starting:
            self._stopped = True
            for process in list(self._processes):
                process.terminate()


def read_row(path: Path) -> Row:
    return Row(**json.loads(path.read_text()))


def title_of(name: str, point: Point) -> str:
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


def _steps_of_budget(
    variant: Variant, point: Point, siblings: Siblings
) -> list[tuple[Variant, Point]]:
    """Whose time of an iteration has to be known to settle the length of a training."""
    if variant.budget.like is not None:
        return [(variant, point), (_like(variant, siblings), {})]
    return [(variant, point)] if variant.budget.minutes is not None else []


def _folder_name(variant: Variant, digest: str) -> str:
    return f"{slug(f'{variant.group} {variant.name}')}-{digest}"


def _evaluations(period: int) -> dict[str, object]:
    """The keys of evaluations at a period, of which none ends a training or keeps a checkpoint."""
    return {"TEST.EVAL_PERIOD": period, "TEST.BEST_METRIC": "", "TEST.PATIENCE": 0}


def _words(values: Mapping[str, object]) -> list[str]:
    return [str(word) for pair in values.items() for word in pair]


def _hash(cfg: CfgNode, without: tuple[str, ...] = ()) -> str:
    cfg = cfg.clone()
    for key in (*_OF_THE_RUN, *without):
        *nodes, name = key.split(".")
        node = cfg
        for part in nodes:
            node = node[part]
        del node[name]
    digest = hashlib.sha256(cfg.dump().encode())
    for _, json_file, _ in cfg.DATASETS.COCO_FILES:
        digest.update((ROOT / os.path.expanduser(json_file)).read_bytes())
    return digest.hexdigest()[:10]


def _last_words(folder: Path) -> str:
    lines = [x for x in (folder / "stderr.txt").read_text().splitlines() if x.strip()]
    return f"it failed: {lines[-1] if lines else 'it said nothing'} (see {folder})"

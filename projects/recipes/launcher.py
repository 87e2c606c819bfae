"""Trains a variant in a process of its own.

Beside its other files the folder of a training has ``stderr.txt``, what the process said there.
"""

import hashlib
import math
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from detectron2.config import CfgNode
from plan import ROOT, Variant, slug

from lsnet_d2.config_file import load_config
from lsnet_d2.errors import ConfigError, UserError
from lsnet_d2.files import make_folder
from lsnet_d2.solver import NO_EVALUATIONS, scale_schedule, schedule_of_length

Point = Mapping[str, str]

# Not part of what a run is.
_OF_THE_RUN = ("SEED", "OUTPUT_DIR")


class Launcher:
    """Starts trainings with one set of options, and ends them all when asked to."""

    def __init__(self, opts: list[str]) -> None:
        """
        Args:
            opts: keys and values in turn, over those of the variants.
        """
        self.opts = opts
        self._processes: set[subprocess.Popen] = set()
        self._stopped = False
        self._starting = threading.Lock()  # none may start unseen while all are stopped

    def config(self, variant: Variant, point: Point) -> CfgNode:
        """The checked config of a variant at a point of its grid, before its length is set.

        Raises:
            ConfigError: it is not valid, or tests on none or several data sets.
        """
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
        return _words(
            {**variant.opts, **point, **dict(zip(self.opts[::2], self.opts[1::2], strict=True))}
        )

    def schedule(
        self, variant: Variant, point: Point, iterations: int, evaluations: int
    ) -> list[str]:
        """Keys and values that give a training its length.

        Args:
            evaluations: during it, of which the last is at its end; none ends it or keeps a
                checkpoint.
        """
        values = schedule_of_length(self.config(variant, point), iterations)
        period = math.ceil(iterations / evaluations) if evaluations > 1 else 0
        return _words({**values, **NO_EVALUATIONS, "TEST.EVAL_PERIOD": period})

    def run(
        self,
        variant: Variant,
        point: Point,
        folder: Path,
        *,
        seed: int,
        opts: list[str],
        jobs: int = 1,
    ) -> int:
        """Train until the end.

        Args:
            folder: for what comes out; a training that was cut off in it goes on.
            opts: keys and values in turn, over all others.
            jobs: trainings that share the machine's cores.

        Returns:
            The exit status, see ``train.py``.

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


def recipe_name(variant: Variant, cfg: CfgNode, without: tuple[str, ...] = ()) -> str:
    """A name for files, which is another one with another config or other annotations.

    Args:
        without: keys that do not count.
    """
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
    return f"{slug(f'{variant.group} {variant.name}')}-{digest.hexdigest()[:10]}"


def last_words(folder: Path) -> str:
    """Why a training failed, as far as it said."""
    lines = [x for x in (folder / "stderr.txt").read_text().splitlines() if x.strip()]
    return f"it failed: {lines[-1] if lines else 'it said nothing'} (see {folder})"


def _words(values: Mapping[str, object]) -> list[str]:
    return [str(word) for pair in values.items() for word in pair]

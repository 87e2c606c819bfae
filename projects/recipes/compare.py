#!/usr/bin/env python
"""Train variants of a plan for the same time, or number of iterations, and tabulate what comes out.

The plan is a YAML file, see projects/recipes/README.md. Finished trainings are kept, and those
that were cut off go on when the same command is given again. Where budgets are minutes, run it on
an otherwise idle machine: a short run finds how many iterations fit.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from curves import draw_curves
from folders import data_opts
from pictures import draw_extremes
from plan import ROOT, Budget, Plan, Variant, read_plan
from report import best_point, write_report
from rows import Row
from runs import Trainings
from versions import current_version

import lsnet_d2  # noqa: F401  (registers the model, the backbones and the data sets)
from lsnet_d2.config_file import resolve_device
from lsnet_d2.errors import UserError, did_you_mean, exit_on_user_error
from lsnet_d2.files import make_folder

_BUSY = 0.5  # load average from which on short runs say little


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path, metavar="PLAN.yaml")
    parser.add_argument(
        "--data", type=Path, nargs="+", metavar="DIR", help="folders in COCO's format, together"
    )
    parser.add_argument(
        "--val-data",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="folders to test on, in place of --data's",
    )
    parser.add_argument("--groups", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--seeds", type=int, nargs="+", help="in place of the plan's")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, help="of each training, in place of the plan's")
    budget.add_argument("--iterations", type=int, help="in place of the plan's budgets")
    parser.add_argument(
        "--jobs", type=int, default=1, help="trainings at once; their times say nothing then"
    )
    parser.add_argument("--device", default="auto", help="of torch; auto: a GPU if there is one")
    parser.add_argument(
        "--timing-iterations", type=int, default=40, help="of the short runs, at least 3"
    )
    parser.add_argument(
        "--pictures", type=int, default=0, metavar="N", help="of each row, half best, half worst"
    )
    parser.add_argument(
        "--table", action="store_true", help="train nothing, tabulate what is there"
    )
    parser.add_argument("--output", type=Path, help="folder; output/{name of the plan} by default")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="last: KEY VALUE pairs for all"
    )
    return parser


def choose(plan: Plan, args: argparse.Namespace) -> tuple[Variant, ...]:
    """The variants of the groups and names asked for.

    Raises:
        UserError: the plan has no such group or variant.
    """
    chosen = plan.variants
    for option, attribute in (("groups", "group"), ("variants", "name")):
        known = list(dict.fromkeys(getattr(variant, attribute) for variant in plan.variants))
        asked = getattr(args, option) or known
        for name in asked:
            if name not in known:
                raise UserError(f"--{option}: the plan has no {name!r}{did_you_mean(name, known)}")
        chosen = tuple(variant for variant in chosen if getattr(variant, attribute) in asked)
    if not chosen:
        raise UserError("no variant is in the groups and has the names asked for")
    return chosen


class Comparison:
    """Trains what is chosen, and keeps the report up to date.

    Attributes:
        failures: messages of trainings that failed; the others go on.
    """

    def __init__(
        self, trainings: Trainings, variants: tuple[Variant, ...], seeds: tuple[int, ...]
    ) -> None:
        self.trainings = trainings
        self.variants = variants
        self.seeds = seeds
        self.failures: list[str] = []
        self.text = ""

    def run(self) -> None:
        """Of a grid all points with the first seed, and the best one with the others."""
        first, others = self.seeds[0], self.seeds[1:]
        gridded = [variant for variant in self.variants if len(variant.points) > 1]
        self._train_all(
            [(v, p, first) for v in self.variants for p in v.points]
            + [(v, v.points[0], seed) for v in self.variants if v not in gridded for seed in others]
        )
        picked = [(v, self._pick(v)) for v in gridded]
        self.failures += [
            f"{v.group}: {v.name}: no training of the grid has a {v.select}"
            for v, point in picked
            if not point
        ]
        self._train_all([(v, p, seed) for v, p in picked if p for seed in others])

    def _train_all(self, runs: list[tuple]) -> None:
        # Threads only wait for processes.
        executor = ThreadPoolExecutor(self.trainings.jobs)
        try:
            for done in as_completed([executor.submit(self.trainings.train, *run) for run in runs]):
                try:
                    done.result()
                except UserError as error:
                    self.failures.append(str(error))
                    print(f"error: {error}", file=sys.stderr, flush=True)
                self.report()
        except BaseException:  # the user has had enough
            executor.shutdown(wait=False, cancel_futures=True)
            self.trainings.stop()
            raise
        finally:
            executor.shutdown()

    def _tried(self, variant: Variant) -> list[Row]:
        found = (self.trainings.find(variant, p, self.seeds[0]) for p in variant.points)
        return [row for row in found if row]

    def _pick(self, variant: Variant) -> dict[str, str] | None:
        """The best point of a grid among those that have ended; None: none has the figure."""
        return best_point(self._tried(variant), variant.select)

    def rows(self) -> list[Row]:
        """What has ended, of each variant at its best point."""
        rows = []
        for variant in self.variants:
            point = variant.points[0] if len(variant.points) == 1 else self._pick(variant)
            for seed in self.seeds if point is not None else ():
                row = self.trainings.find(variant, point, seed)
                rows += [row] if row else []
        return rows

    def report(self) -> None:
        grids = [
            (v, tried) for v in self.variants if len(v.points) > 1 and (tried := self._tried(v))
        ]
        self.text = write_report(self.trainings.output, self.trainings.version, self.rows(), grids)


def say(text: str) -> None:
    print(text, flush=True)


def illustrate(rows: list[Row], output: Path, count: int, say: Callable[[str], None]) -> None:
    """Curves of each group, and pictures of the first seed of each row."""
    for path in draw_curves(rows, output):
        say(f"{path}")
    drawn = set()
    for row in rows if count else ():
        key = (row.group, row.name)
        if key not in drawn and not row.diverged:
            drawn.add(key)
            say(f"{draw_extremes(row, output, count)}")


@exit_on_user_error()
def main() -> None:
    # as after Ctrl-C, so that no training is left behind
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    args = get_parser().parse_args()
    if args.jobs < 1 or args.timing_iterations < 3 or args.pictures < 0:
        raise UserError("--jobs must be 1 or more, --timing-iterations 3, --pictures 0")
    if not all(limit is None or limit > 0 for limit in (args.minutes, args.iterations)):
        raise UserError("--minutes and --iterations must be positive")
    given = args.minutes or args.iterations
    budget = Budget(minutes=args.minutes, iterations=args.iterations) if given else None
    plan = read_plan(args.plan, budget=budget)
    output = make_folder(args.output or ROOT / "output" / args.plan.stem).resolve()
    device = resolve_device(args.device)
    opts = ["MODEL.DEVICE", device, *args.opts]
    if args.val_data and not args.data:
        raise UserError("--val-data needs --data")
    if args.data and not plan.data:
        raise UserError(f"{args.plan} has no 'data': its configs name their data themselves")
    if args.data:
        opts = data_opts(args.data, plan.data, output / "data", val=args.val_data or ()) + opts
    elif plan.data and "DATASETS.COCO_FILES" not in args.opts:
        raise UserError(f"{args.plan} needs --data, folders in COCO's format")
    if len(opts) % 2:
        raise UserError(f"--opts must be KEY VALUE pairs, not {args.opts}")
    if (load := os.getloadavg()[0]) > _BUSY and not args.table:
        say(f"the load of this machine is {load:.1f}: times will be of little worth")
    trainings = Trainings(
        output,
        current_version(device),
        opts=opts,
        evaluations=plan.evaluations,
        jobs=args.jobs,
        timing_iterations=args.timing_iterations,
        say=say,
    )
    comparison = Comparison(
        trainings, choose(plan, args), tuple(dict.fromkeys(args.seeds or plan.seeds))
    )
    trainings.prepare(comparison.variants, measure=not args.table)
    if not args.table:
        comparison.run()
    comparison.report()
    illustrate(comparison.rows(), output, args.pictures, say)
    print(comparison.text)
    if comparison.failures:
        raise UserError("; ".join(comparison.failures))


if __name__ == "__main__":
    main()

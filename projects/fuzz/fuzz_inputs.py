#!/usr/bin/env python
"""Damage annotation files and images in many ways, and see what reading them does.

Each input must be handled, or refused with a message that names it. The exit status is 1 where one
crashes or hangs, and where a message does not say which file it is about.
"""

import argparse
import logging
import multiprocessing
import os
import random
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from annotations import damage_annotations, read_annotations, report_annotations
from images import SIZE, damage_image, read_one_image
from PIL import Image

from lsnet_d2.errors import UserError

HANDLED, REFUSED, CRASHED, HUNG = "handled", "refused", "crashed", "hung"
OUTCOMES = (HANDLED, REFUSED, CRASHED, HUNG)

PARTS: dict[str, tuple[Callable, str, Callable]] = {
    "annotations": (damage_annotations, "fuzzed.json", read_annotations),
    "reports": (damage_annotations, "fuzzed.json", report_annotations),
    "images": (damage_image, "fuzzed.img", read_one_image),
}


def make_input(part: str, seed: int, number: int) -> tuple[str, bytes]:
    """Kind and content of one input, which depend on the arguments alone."""
    return PARTS[part][0](random.Random(f"{part} {seed} {number}"))


def try_input(folder: Path, part: str, seed: int, number: int) -> tuple[str, str]:
    """Outcome, and what was said about it."""
    _, file_name, read = PARTS[part]
    (folder / file_name).write_bytes(make_input(part, seed, number)[1])
    try:
        read(folder, number)
    except UserError as error:
        named = any(name in str(error) for name in (file_name, "1.png", "2.png"))
        return (REFUSED, str(error)) if named else (CRASHED, f"no file is named: {error}")
    except Exception:
        return CRASHED, traceback.format_exc()
    return HANDLED, ""


def work(connection: Connection, folder: Path, seed: int) -> None:
    """Try what is asked for, in a process of its own, which may die of it."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    while True:
        part, number = connection.recv()
        connection.send(try_input(folder, part, seed, number))


class Worker:
    """A process that tries inputs, and another one when that has died or hangs."""

    def __init__(self, folder: Path, seed: int, patience: float) -> None:
        self._arguments, self._patience = (folder, seed), patience
        self._start()

    def _start(self) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("fork").Process(
            target=work, args=(theirs, *self._arguments), daemon=True
        )
        self._process.start()
        theirs.close()

    def ask(self, part: str, number: int) -> tuple[str, str]:
        self._connection.send((part, number))
        if self._connection.poll(self._patience):
            try:
                return self._connection.recv()
            except EOFError:
                self._process.join()
                outcome = CRASHED, f"the process died: exit code {self._process.exitcode}"
        else:
            outcome = HUNG, f"no answer in {self._patience:g} seconds"
        self.stop()
        self._start()
        return outcome

    def stop(self) -> None:
        self._process.kill()
        self._process.join()


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--annotations", type=int, default=1500, help="annotation files")
    parser.add_argument("--reports", type=int, default=500, help="annotation files to report on")
    parser.add_argument("--images", type=int, default=1000, help="images")
    parser.add_argument("--seed", type=int, default=0, help="of the damage")
    parser.add_argument("--patience", type=float, default=20, help="seconds an input may take")
    parser.add_argument("--keep", metavar="FOLDER", help="write inputs that fail into a folder")
    return parser


def main() -> int:
    args = get_parser().parse_args()
    counts, failures = {}, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        for image in (1, 2):
            Image.new("RGB", SIZE[::-1], (90, 60 * image, 30)).save(folder / f"images/{image}.png")
        worker = Worker(folder, args.seed, args.patience)
        for part in PARTS:
            for number in range(getattr(args, part)):
                outcome, text = worker.ask(part, number)
                kind, content = make_input(part, args.seed, number)
                counts.setdefault((part, kind), Counter())[outcome] += 1
                if outcome in (CRASHED, HUNG):
                    failures.append((part, kind, number, outcome, text))
                    if args.keep:
                        os.makedirs(args.keep, exist_ok=True)
                        Path(args.keep, f"{part}_{args.seed}_{number}").write_bytes(content)
        worker.stop()
    for part, kind, number, outcome, text in failures:
        print(f"{part} {number} ({kind}) {outcome}: {text}", file=sys.stderr)
    print_table(counts)
    return 1 if failures else 0


def print_table(counts: dict[tuple[str, str], Counter]) -> None:
    rows = sorted((*key, found) for key, found in counts.items())
    print("| inputs | damage | tried | " + " | ".join(OUTCOMES) + " |")
    print("| --- " * (3 + len(OUTCOMES)) + "|")
    rows.append(("all", "", sum(counts.values(), Counter())))
    for part, kind, found in rows:
        cells = [part, kind, found.total(), *(found[outcome] for outcome in OUTCOMES)]
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    sys.exit(main())

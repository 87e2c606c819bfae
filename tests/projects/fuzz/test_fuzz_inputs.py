import os
import signal
import sys
import time
from collections import Counter

import pytest
from fuzz_project import fuzz_inputs

from lsnet_d2.errors import UserError

FEW = ["--annotations", "100", "--reports", "40", "--images", "80"]


@pytest.mark.parametrize(
    ("counts", "total"),
    [pytest.param(FEW, 220, id="few"), pytest.param([], 3000, id="all", marks=pytest.mark.slow)],
)
def test_damaged_inputs_are_handled_or_refused(monkeypatch, capsys, counts, total):
    monkeypatch.setattr(sys, "argv", ["fuzz_inputs.py", *counts])
    status = fuzz_inputs.main()
    printed = capsys.readouterr()
    assert status == 0, printed.err
    name, _, tried, handled, refused, crashed, hung = (
        cell.strip() for cell in printed.out.splitlines()[-1].strip("|").split("|")
    )
    assert (name, tried, crashed, hung) == ("all", str(total), "0", "0")
    assert min(int(handled), int(refused)) > total / 6


def test_inputs_depend_on_the_seed_alone():
    for part in fuzz_inputs.PARTS:
        inputs = [fuzz_inputs.make_input(part, 3, number) for number in range(60)]
        assert inputs == [fuzz_inputs.make_input(part, 3, number) for number in range(60)]
        assert len(set(inputs)) > 50
        assert inputs != [fuzz_inputs.make_input(part, 4, number) for number in range(60)]
        kinds = Counter(kind for kind, _ in inputs)
        assert len(kinds) >= 5


def die(folder, number):
    os.kill(os.getpid(), signal.SIGKILL)


def hang(folder, number):
    time.sleep(60)


def fail(folder, number):
    raise ZeroDivisionError


def refuse(folder, number):
    raise UserError(f"{folder / 'fuzzed.img'} is damaged")


def refuse_without_a_name(folder, number):
    raise UserError("something is damaged")


@pytest.mark.parametrize(
    ("read", "outcome", "text"),
    [
        (die, "crashed", "the process died: exit code -9"),
        (hang, "hung", "no answer in 0.5 seconds"),
        (fail, "crashed", "ZeroDivisionError"),
        (refuse, "refused", "is damaged"),
        (refuse_without_a_name, "crashed", "no file is named: something is damaged"),
    ],
)
def test_outcomes(tmp_path, monkeypatch, read, outcome, text):
    damage = fuzz_inputs.damage_image
    monkeypatch.setitem(fuzz_inputs.PARTS, "images", (damage, "fuzzed.img", read))
    worker = fuzz_inputs.Worker(tmp_path, 0, 0.5 if read is hang else 60)
    try:
        for number in (0, 1):  # the second one has a process again
            found, said = worker.ask("images", number)
            assert found == outcome and text in said
    finally:
        worker.stop()

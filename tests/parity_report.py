"""`pytest --parity-report` writes into docs/parity.md what the comparisons of tests have found."""

import platform
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from parity import Finding

from lsnet_d2.files import atomic_write

BEGIN, END = "<!-- begin: pytest --parity-report -->\n", "<!-- end -->\n"
# Options of pytest that leave tests out
SELECTIONS = ("keyword", "markexpr", "deselect", "ignore", "ignore_glob", "lf", "stepwise")


class ParityReport:
    """Runs the tests that compare with recorded numbers, and tabulates the largest differences.

    The tables replace what lies between two marks of the page, once all these tests have run and
    none has failed. A selection of tests is refused at the start.
    """

    def __init__(self, page: Path) -> None:
        self.page = page
        self.findings: list[Finding] = []
        self._pending: set[str] = set()

    def pytest_configure(self, config: pytest.Config) -> None:
        selected = config.args_source is not pytest.Config.ArgsSource.TESTPATHS
        if selected or any(config.getoption(name, None) for name in SELECTIONS):
            raise pytest.UsageError("--parity-report is of all tests: name and select none")
        text = self.page.read_text("utf-8") if self.page.is_file() else ""
        if not 0 <= text.find(BEGIN) < text.find(END):
            raise pytest.UsageError(f"{self.page}: no page with {BEGIN.strip()} and {END.strip()}")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list) -> None:
        others = [item for item in items if "parity" not in item.fixturenames]
        items[:] = [item for item in items if "parity" in item.fixturenames]
        config.hook.pytest_deselected(items=others)
        self._pending = {item.nodeid for item in items}

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._pending.discard(nodeid)

    def pytest_terminal_summary(self, terminalreporter, exitstatus: int) -> None:
        if exitstatus != pytest.ExitCode.OK or self._pending:
            terminalreporter.write_line(f"{self.page} is as it was: not all comparisons passed")
            return
        text = self.page.read_text("utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        with atomic_write(self.page, "w") as file:
            file.write(before + BEGIN + tables(self.findings) + END + after)
        terminalreporter.write_line(f"{self.page} is up to date")


def tables(findings: Iterable[Finding]) -> str:
    """In Markdown: models, with a column for each case, then components, as the tests have them."""
    findings = sorted(findings, key=lambda f: (f.file, f.line))
    models = [f for f in findings if f.case is not None]
    components = [f for f in findings if f.case is None]
    cases = list(dict.fromkeys(f.case for f in models))
    lines = [
        f"Written with torch {torch.__version__} on the CPU ({platform.machine()}).",
        "",
        "### Whole models",
        "",
        _row(["quantity", "numbers", "unit", "limit", *cases]),
        _row(["---"] * (4 + len(cases))),
    ]
    for (quantity, unit, within), found in _grouped(models, _what):
        of_case = dict(_grouped(found, lambda f: f.case))
        cells = [_largest(of_case[case]) if case in of_case else "" for case in cases]
        lines.append(_row([quantity, _total(found), unit, _number(within), *cells]))
    lines += [
        "",
        "### Components",
        "",
        _row(["quantity", "numbers", "unit", "limit", "largest difference", "test"]),
        _row(["---"] * 6),
    ]
    for (quantity, unit, within), found in _grouped(components, _what):
        cells = [_total(found), unit, _number(within), _largest(found), f"`{found[0].file}`"]
        lines.append(_row([quantity, *cells]))
    return "\n".join(lines) + "\n"


def _what(finding: Finding) -> tuple[str, str, float]:
    return finding.quantity, finding.unit, finding.within


def _grouped(findings: Iterable[Finding], key: Callable) -> list[tuple]:
    """In the order of first appearance."""
    groups: dict = {}
    for finding in findings:
        groups.setdefault(key(finding), []).append(finding)
    return list(groups.items())


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _largest(findings: list[Finding]) -> str:
    return _number(max(f.difference for f in findings))


def _total(findings: list[Finding]) -> str:
    return f"{sum(f.numbers for f in findings):,}"


def _number(value: float) -> str:
    if value == int(value):
        return str(int(value))
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"

"""The page of docs/parity.md, for a small project that compares with recorded numbers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from parity import Parity
from parity_report import BEGIN, END, ParityReport, tables

HERE = Path(__file__).parent
PAGE = f"# Above\n{BEGIN}old\n{END}below\n"

TESTS = """
def test_component(parity):
    parity.absolute("sums", [1.0, 2.0], [1.0, 2.25], within=0.5, unit="px")

def test_other():
    raise AssertionError("compares nothing, so it is left out")
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\ntestpaths = ["tests"]\n')
    tests = tmp_path / "tests"
    tests.mkdir()
    for name in ("conftest.py", "parity.py", "parity_report.py"):
        shutil.copy(HERE / name, tests)
    data = HERE / "data" / "parity" / "golden_weight.py"
    (tests / "data" / "parity").mkdir(parents=True)
    shutil.copy(data, tests / "data" / "parity")
    (tests / "test_small.py").write_text(TESTS)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "parity.md").write_text(PAGE)
    return tmp_path


def run(project, *arguments):
    command = [sys.executable, "-m", "pytest", "--parity-report", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    return result, (project / "docs" / "parity.md").read_text()


@pytest.mark.slow
class TestCommand:
    def test_writes_between_the_marks(self, project):
        result, page = run(project)
        assert result.returncode == 0
        assert "1 passed, 1 deselected" in result.stdout
        assert "parity.md is up to date" in result.stdout
        assert page.startswith(f"# Above\n{BEGIN}Written with torch ")
        assert page.endswith(f"\n{END}below\n") and "old" not in page
        assert "| sums | 2 | px | 5e-1 | 2.5e-1 | `tests/test_small.py` |\n" in page

    def test_selection_is_refused(self, project):
        result, page = run(project, "tests/test_small.py")
        assert result.returncode == pytest.ExitCode.USAGE_ERROR and page == PAGE
        assert "--parity-report is of all tests: name and select none" in result.stderr

    def test_failure_leaves_the_page(self, project):
        wrong = "\ndef test_wrong(parity):\n    parity.equal('labels', ['a'], ['b'])\n"
        (project / "tests" / "test_small.py").write_text(TESTS + wrong)
        result, page = run(project)
        assert result.returncode == pytest.ExitCode.TESTS_FAILED and page == PAGE
        assert "parity.md is as it was: not all comparisons passed" in result.stdout


class FakeConfig:
    args_source = pytest.Config.ArgsSource.TESTPATHS

    def __init__(self, **options):
        self.getoption = options.get


def test_any_selection_and_pages_without_marks_are_refused(tmp_path):
    page = tmp_path / "page.md"
    report = ParityReport(page)
    for text in (None, "# No marks\n", END + BEGIN):
        if text is not None:
            page.write_text(text)
        with pytest.raises(pytest.UsageError, match=r"page\.md: no page with <!-- begin"):
            report.pytest_configure(FakeConfig())
    page.write_text(PAGE)
    report.pytest_configure(FakeConfig())
    for option in ({"keyword": "losses"}, {"markexpr": "not slow"}, {"lf": True}):
        with pytest.raises(pytest.UsageError, match="select none"):
            report.pytest_configure(FakeConfig(**option))


def test_tables():
    findings = []
    a, b, component = (Parity(findings.append, "tests/x.py", 1, case) for case in ("a", "b", None))
    a.relative("losses", [2.0, 0.0], [2.00002, 0.0], within=1e-4)
    a.relative("losses", 1.0, 1.00005, within=1e-4)
    b.relative("losses", 5.0, 5.0, within=1e-4)
    b.relative("losses", 5.0, 5.01, within=1e-2)  # another limit is another row
    component.equal("labels", ["x", "y"], ["x", "y"])
    text = tables(findings)
    assert "| quantity | numbers | unit | limit | a | b |" in text
    assert "| losses | 4 | of the value | 1e-4 | 5e-5 | 0 |" in text
    assert "| losses | 1 | of the value | 1e-2 |  | 2e-3 |" in text
    assert "| labels | 2 | that differ | 0 | 0 | `tests/x.py` |" in text


class TestComparisons:
    @pytest.fixture
    def findings(self):
        return []

    @pytest.fixture
    def compare(self, findings):
        return Parity(findings.append, "tests/x.py", 1)

    def test_limits(self, compare, findings):
        compare.absolute("x", [1.0, -2.0], [1.0, -2.5], within=0.5)
        compare.relative("x", [1.0, 0.0], [2.0, 0.1], within=0.5, least=1.0)
        assert [f.difference for f in findings] == [0.5, 0.5]
        with pytest.raises(AssertionError, match=r"x \(level 3\): 0\.5 absolute, limit 0\.4"):
            compare.absolute("x", 1.0, 1.5, within=0.4, about="level 3")
        with pytest.raises(AssertionError, match="x: 1.0 that differ"):
            compare.equal("x", [1, 2], [1, 3])
        assert len(findings) == 2

    def test_not_a_number_is_no_agreement(self, compare):
        for method in (compare.absolute, compare.relative):
            with pytest.raises(AssertionError):
                method("x", [float("nan")], [1.0], within=1.0)

    def test_shapes_must_agree(self, compare):
        for values in ([1.0], [[1.0], [1.0]]):
            with pytest.raises(AssertionError):
                compare.absolute("x", values, [1.0, 1.0], within=1.0)

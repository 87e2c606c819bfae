import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCORES = {"AP": 40.0, "AP50": 60.0, "AP75": 45.0, "APs": 20.0, "APm": 50.0}

spec = importlib.util.spec_from_file_location("compare", ROOT / "projects/shapes/compare.py")
compare = importlib.util.module_from_spec(spec)
sys.modules["compare"] = compare  # dataclasses look their module up
spec.loader.exec_module(compare)


@pytest.fixture
def runs(monkeypatch):
    """The commands of the trainings, each of which leaves three times of 0.5 s and its scores."""
    commands = []

    def run(command, **_):
        commands.append(command)
        output = Path(command[command.index("OUTPUT_DIR") + 1])
        output.mkdir(parents=True, exist_ok=True)
        with open(output / "metrics.json", "a") as file:
            for line in ({"time": 0.5},) * 3:
                file.write(json.dumps(line) + "\n")
            file.write(json.dumps({f"bbox/{key}": value for key, value in SCORES.items()}) + "\n")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_a_finished_run_is_kept(runs, tmp_path):
    row = compare.train("LSNet", "shapes_bbox", 100, 1, tmp_path / "lsnet")
    assert row == compare.Row("LSNet", 100, 50.0, SCORES)
    assert compare.train("LSNet", "shapes_bbox", 100, 1, tmp_path / "lsnet") == row
    assert len(runs) == 1


def test_a_run_that_was_cut_off_starts_in_a_clean_folder(runs, tmp_path):
    (tmp_path / "lsnet").mkdir()
    (tmp_path / "lsnet" / "metrics.json").write_text(10 * (json.dumps({"time": 9.0}) + "\n"))
    assert compare.train("LSNet", "shapes_bbox", 100, 1, tmp_path / "lsnet").seconds == 50


def test_a_failing_write_leaves_no_finished_run(runs, tmp_path, monkeypatch):
    def full_disk(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(json, "dump", full_disk)
    with pytest.raises(OSError, match="no space"):
        compare.train("LSNet", "shapes_bbox", 100, 1, tmp_path / "lsnet")
    assert [path.name for path in (tmp_path / "lsnet").iterdir()] == ["metrics.json"]

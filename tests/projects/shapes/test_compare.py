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
    """The commands of the trainings. Each leaves three times, half a second for LSNet and a
    quarter for others, and its scores where it is tested."""
    commands = []

    def run(command, **_):
        commands.append(command)
        options = dict(zip(command[2::2], command[3::2], strict=True))
        config = Path(options["--config-file"]).stem
        iterations = int(options.get("SOLVER.MAX_ITER", 100))
        seconds = 0.25 if "rcnn" in config else 0.5
        lines = [{"time": seconds, "iteration": i, "loss_cls": 0.1} for i in range(iterations)[-3:]]
        if options.get("DATASETS.TEST") != "()":
            scores = {f"bbox/{key}": value for key, value in SCORES.items()}
            scores |= {"bbox/AP-star": 1.0, "segm/AP": 30.0, "segm/APs": float("nan")}
            lines.append({"iteration": iterations, **scores})
        output = Path(options["OUTPUT_DIR"])
        output.mkdir(parents=True, exist_ok=True)
        with open(output / "metrics.json", "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_a_finished_run_is_kept(runs, tmp_path):
    row = compare.train("LSNet", "shapes_bbox", tmp_path / "lsnet", 1)
    scores = {f"bbox/{key}": value for key, value in SCORES.items()}
    assert row == compare.Row("LSNet", 100, 50.0, {**scores, "segm/AP": 30.0, "segm/APs": None})
    assert compare.train("LSNet", "shapes_bbox", tmp_path / "lsnet", 1) == row
    assert len(runs) == 1


def test_a_run_that_was_cut_off_starts_in_a_clean_folder(runs, tmp_path):
    (tmp_path / "lsnet").mkdir()
    (tmp_path / "lsnet" / "metrics.json").write_text(10 * (json.dumps({"time": 9.0}) + "\n"))
    assert compare.train("LSNet", "shapes_bbox", tmp_path / "lsnet", 1).seconds == 50


def test_a_failing_write_leaves_no_finished_run(runs, tmp_path, monkeypatch):
    def full_disk(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(json, "dump", full_disk)
    with pytest.raises(OSError, match="no space"):
        compare.train("LSNet", "shapes_bbox", tmp_path / "lsnet", 1)
    assert [path.name for path in (tmp_path / "lsnet").iterdir()] == ["metrics.json"]


def test_rivals_are_trained_for_as_long(runs, tmp_path):
    rows = compare.train_all(["segm"], 1, tmp_path)
    assert [(row.name, row.iterations, row.seconds) for row in rows] == [
        ("LSNet segm", 100, 50.0),
        ("Mask R-CNN, as long as segm", 200, 50.0),
    ]
    assert [Path(run[run.index("--config-file") + 1]).stem for run in runs] == [
        "shapes_segm",
        "shapes_mask_rcnn",  # for the time of a step
        "shapes_mask_rcnn",
    ]


def test_tables_have_means_and_spreads():
    def row(ap, small):
        figures = ("AP50", "AP75", "APm")
        scores = {"segm/AP": ap, "segm/APs": small, **{f"segm/{key}": 50.0 for key in figures}}
        return compare.Row("LSNet segm", 1500, 600.0, scores)

    text = compare.tables([row(40.0, 30.0), row(42.0, None)])
    assert text.splitlines() == [
        "| masks | iterations | minutes | AP | spread | AP50 | AP75 | APs | APm |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| LSNet segm | 1,500 | 10.0 | 41.0 | 2.0 | 50.0 | 50.0 |  | 50.0 |",
    ]

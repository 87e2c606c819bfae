"""Comparisons whose trainings are faked, and one that is real."""

import json
import subprocess
import sys

import pytest
import tiny_coco
from recipes_project import (
    VERSION,
    FakeTraining,
    compare,
    curves,
    plan,
    runs,
    train,
    train_all,
    variant,
    versions,
)
from tiny_coco import ROOT

from lsnet_d2.errors import NonFiniteWeightsError, TrainingError, UserError


def test_variants_are_trained_for_as_long_as_another(commands, tmp_path):
    rcnn = variant("Mask R-CNN", "shapes_mask_rcnn", budget=plan.Budget(like="LSNet"))
    ours = variant(budget=plan.Budget(iterations=580))
    rows = train_all(tmp_path, ours, rcnn, evaluations=4).rows()
    assert [(row.name, row.iterations, row.step_seconds) for row in rows] == [
        ("LSNet", 580, 0.5),
        ("Mask R-CNN", 1160, 0.25),
    ]
    assert rows[0].scores == {"bbox/AP": 11.0, "bbox/APl": None}
    assert rows[0].peak_memory == 200 and rows[0].parameters == 3e6
    timed = [c for c in commands if c.get("DATASETS.TEST") == "()"]
    assert [c["SOLVER.MAX_ITER"] for c in timed] == ["40"] * 6
    assert ["rcnn" in c["--config-file"] for c in timed] == [True, False] * 3  # in turn
    # the schedule of 1,450 iterations, and four evaluations
    (ours,) = (c for c in commands if c["SOLVER.MAX_ITER"] == "580")
    assert (ours["SOLVER.WARMUP_ITERS"], ours["SOLVER.CHECKPOINT_PERIOD"]) == ("40", "200")
    assert ours["TEST.EVAL_PERIOD"] == "145"


def test_what_was_trained_counts_under_another_name(commands, tmp_path):
    """A recipe may become a point of a grid, and a point of a grid the recipe."""
    plain = variant(opts={"SOLVER.BASE_LR": "0.04"}, budget=plan.Budget(iterations=100))
    train_all(tmp_path, plain)
    grid = variant(grid={"SOLVER.BASE_LR": ("0.02", "0.04")}, budget=plan.Budget(iterations=100))
    comparison = train_all(tmp_path, grid, seeds=(1, 2))
    assert [(row.point, row.seed) for row in comparison.rows()] == [
        ({"SOLVER.BASE_LR": "0.04"}, seed) for seed in (1, 2)
    ]
    assert not comparison.failures and len(commands) == 3
    rows = train_all(tmp_path, plain, seeds=(1, 2)).rows()
    assert [(row.point, row.seed) for row in rows] == [({}, 1), ({}, 2)]
    assert len(commands) == 3


def test_the_best_of_a_grid_is_trained_with_all_seeds(commands, tmp_path):
    grid = {"SOLVER.BASE_LR": ("0.02", "0.04", "0.2")}
    comparison = train_all(
        tmp_path, variant(grid=grid, budget=plan.Budget(minutes=1)), seeds=(1, 2, 3)
    )
    timed, trained = commands[:3], [(c["SOLVER.BASE_LR"], c["SEED"]) for c in commands[3:]]
    first = [("0.02", "1"), ("0.04", "1"), ("0.2", "1")]
    assert trained == [*first, ("0.04", "2"), ("0.04", "3")]
    assert {c["SOLVER.MAX_ITER"] for c in timed} == {"40"}  # short runs for all of the grid
    assert [row.scores["bbox/AP"] for row in comparison.rows()] == [41.0, 42.0, 43.0]
    assert not comparison.failures
    assert "| BASE_LR 0.04 | 41.0 | taken |\n| BASE_LR 0.2 | diverged |  |" in comparison.text


def test_a_run_that_was_cut_off_goes_on_and_counts_what_was_written_last(commands, tmp_path):
    trainings = runs.Trainings(tmp_path, VERSION, opts=["MODEL.DEVICE", "cpu"])
    cut_off = variant(budget=plan.Budget(iterations=100))
    trainings.prepare((cut_off,))
    folder = trainings.folder(cut_off, {}, 1)
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text('{"iteration": 99, "time": 9.0}\n{"iteration": 119, "ti')
    row = trainings.train(cut_off, {}, 1)
    assert (row.step_seconds, row.scores["bbox/AP"]) == (0.5, 11.0)


def test_other_configs_and_other_code_are_trained_anew(commands, tmp_path):
    short = plan.Budget(iterations=10)
    train_all(tmp_path, variant(budget=short))
    train_all(tmp_path, variant(budget=short, opts={"SOLVER.BASE_LR": "0.02"}))
    assert len(commands) == 2
    other = versions.Version(**{**vars(VERSION), "torch": "3"})
    comparison = train_all(tmp_path, variant(budget=short), version=other)
    assert len(commands) == 3 and len(comparison.rows()) == 1
    assert comparison.text.count("torch 2,") == 2  # listed apart


def test_code_that_changes_meanwhile_stops_the_comparison(commands, tmp_path):
    old = versions.Version(**{**vars(VERSION), "code": "0123"})
    comparison = train_all(tmp_path, variant(budget=plan.Budget(iterations=10)), version=old)
    assert not commands and not comparison.rows()
    assert "the code has changed" in comparison.failures[0]


def test_several_at_once_are_marked(commands, tmp_path):
    ours = variant(budget=plan.Budget(iterations=10))
    rows = train_all(tmp_path, ours, seeds=(1, 2, 3), jobs=2).rows()
    assert [(row.seed, row.jobs) for row in rows] == [(1, 2), (2, 2), (3, 2)]
    assert "Several trainings ran at once" in (tmp_path / "table.md").read_text()


def test_failures_do_not_stop_the_others(commands, tmp_path, monkeypatch):
    ours = variant(budget=plan.Budget(iterations=10))
    monkeypatch.setattr(FakeTraining, "status", 1)
    comparison = train_all(tmp_path, ours, seeds=(1, 2))
    assert len(comparison.failures) == 2 and "LSNet, seed 1: it failed" in comparison.failures[0]
    assert not list(tmp_path.glob("*/*/*/row.json"))


def test_a_group_with_a_slash(commands, tmp_path):
    ours = variant(group="masks/small", name="a/b", budget=plan.Budget(iterations=10))
    (row,) = train_all(tmp_path, ours).rows()
    assert row.folder.split("/")[1].startswith("masks_small_a_b-")
    assert curves.draw_curves([row], tmp_path) == [tmp_path / "curves_masks_small.png"]
    assert (tmp_path / "curves_masks_small.png").stat().st_size > 1000


def test_what_is_not_in_the_plan(tmp_path):
    shapes = plan.read_plan(ROOT / "projects/shapes/compare.yaml")
    args = compare.get_parser().parse_args(["x", "--groups", "bbox", "--variants", "FCOS", "LSNet"])
    assert [v.name for v in compare.choose(shapes, args)] == ["LSNet", "FCOS"]
    args.groups = ["bbx"]
    with pytest.raises(UserError, match="no 'bbx'; did you mean bbox"):
        compare.choose(shapes, args)


def test_which_errors_are_of_numbers():
    mapped = TrainingError("proposals are no numbers")
    mapped.__cause__ = FloatingPointError()
    for error in (FloatingPointError(), NonFiniteWeightsError(), mapped):
        assert train.has_diverged(error)
    full = TrainingError("no space left")
    full.__cause__ = OSError()
    assert not train.has_diverged(full)


@pytest.mark.slow
def test_a_real_training_that_diverges_is_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tiny_coco.write_coco(tmp_path)
    files = [
        [f"tiny_{split}", str(tiny_coco.json_file(tmp_path, split)), f"{tmp_path}/coco/{split}2017"]
        for split in ("train", "val")
    ]
    ours = plan.Variant(
        group="boxes",
        name="RetinaNet",
        config=tiny_coco.write_config(tmp_path),
        opts={
            **{"DATASETS.TRAIN": "('tiny_train',)", "DATASETS.TEST": "('tiny_val',)"},
            **{"DATASETS.COCO_FILES": repr(files), "SOLVER.BASE_LR": "1e30"},
        },
        budget=plan.Budget(iterations=4),
    )
    trainings = runs.Trainings(tmp_path / "out", VERSION, opts=["MODEL.DEVICE", "cpu"])
    trainings.prepare((ours,))
    row = trainings.train(ours, {}, 1)
    assert (row.diverged, row.scores) == (True, {})
    said = (tmp_path / "out" / row.folder / "stderr.txt").read_text()
    assert "error: iteration 1: " in said and "Traceback" not in said
    monkeypatch.setattr(subprocess, "Popen", None)
    assert trainings.train(ours, {}, 1) == row


@pytest.mark.slow
def test_a_real_comparison(tmp_path):
    tiny_coco.write_coco(tmp_path)
    tiny_coco.write_config(tmp_path)
    (tmp_path / "plan.yaml").write_text(
        "data: {name: tiny, annotations: instances}\n"
        "budget: {iterations: 4}\nevaluations: 2\n"
        "opts: {DATASETS.TRAIN: \"('tiny_train',)\", DATASETS.TEST: \"('tiny_val',)\"}\n"
        "groups:\n  boxes:\n    RetinaNet: {config: tiny.yaml}\n"
    )
    command = [sys.executable, "projects/recipes/compare.py", tmp_path / "plan.yaml", "--data"]
    command += [tmp_path / "coco", "--output", tmp_path / "out", "--pictures", "2"]
    environment = tiny_coco.tool_environment()
    for call in (command, [*command, "--table"]):
        done = subprocess.run(call, capture_output=True, text=True, env=environment, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert "| RetinaNet | 1 | 4 |" in done.stdout
    (row,) = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert row["iterations"] == 4 and row["step_seconds"] > 0 and row["peak_memory"] > 100
    assert row["parameters"] > 1e5
    assert not row["diverged"] and "bbox/AP" in row["scores"]
    folder = tmp_path / "out" / row["folder"]
    metrics = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    assert [m["iteration"] for m in metrics if "bbox/AP" in m] == [1, 4]
    assert [path.name for path in folder.glob("*.pth")] == ["model_final.pth"]
    assert (tmp_path / "out/curves_boxes.png").stat().st_size > 1000
    assert len(list((tmp_path / "out/pictures").glob("*/*/*.png"))) == 2

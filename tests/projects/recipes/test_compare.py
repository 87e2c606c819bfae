"""Comparisons whose trainings are faked, and one that is real."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny_coco
from recipes_project import compare, curves, plan, runs, train, versions
from tiny_coco import ROOT

from lsnet_d2.errors import ConfigError, NonFiniteWeightsError, TrainingError, UserError

SHAPES = ROOT / "configs/quick"
VERSION = versions.Version(
    code=versions.code_hash(), torch="2", detectron2="0.6", device="chip", commit="abc"
)


class FakeTraining:
    """Takes half a second an iteration, a quarter if it is an R-CNN; AP is 1000 times the learning
    rate plus the seed. It diverges with a rate above 0.1."""

    commands: list[dict]
    status = 0

    def __init__(self, command, **_):
        words = command[command.index("--config-file") :]
        options = dict(zip(words[::2], words[1::2], strict=True))
        self.commands.append(options)
        iterations = int(options["SOLVER.MAX_ITER"])
        rate = float(options.get("SOLVER.BASE_LR", 0.01))
        self.returncode = runs.DIVERGED if rate > 0.1 else self.status
        if self.returncode:
            return
        seconds = 0.25 if "rcnn" in options["--config-file"] else 0.5
        lines = [{"time": 60.0, "iteration": 0, "peak_memory": 100.0}]  # warming up
        lines += [{"time": seconds, "iteration": iterations - 1, "peak_memory": 200.0}]
        lines[-1]["parameters"] = 3e6
        if options.get("DATASETS.TEST") != "()":
            ap = 1000 * rate + int(options["SEED"])
            lines.append({"iteration": iterations, "bbox/AP": ap, "bbox/APl": float("nan")})
        with open(Path(options["OUTPUT_DIR"]) / "metrics.json", "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def wait(self):
        return self.returncode

    def terminate(self):
        pass


@pytest.fixture
def commands(monkeypatch):
    monkeypatch.setattr(FakeTraining, "commands", [], raising=False)
    monkeypatch.setattr(subprocess, "Popen", FakeTraining)
    return FakeTraining.commands


def variant(name="LSNet", config="shapes_bbox", **kwargs):
    values = {"group": "bbox", "name": name, "config": SHAPES / f"{config}.yaml", "opts": {}}
    return plan.Variant(**{**values, **kwargs})


def train_all(output, *variants, seeds=(1,), **kwargs):
    trainings = runs.Trainings(
        output, kwargs.pop("version", VERSION), opts=["MODEL.DEVICE", "cpu"], **kwargs
    )
    comparison = compare.Comparison(trainings, variants, seeds)
    trainings.prepare(variants)
    comparison.run()
    comparison.report()
    return comparison


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


def test_minutes_become_iterations_and_finished_runs_are_kept(commands, tmp_path):
    timed = variant(budget=plan.Budget(minutes=10))
    for _ in range(2):
        rows = train_all(tmp_path, timed, seeds=(1, 2)).rows()
    assert [(row.seed, row.iterations) for row in rows] == [(1, 1200), (2, 1200)]
    assert len(commands) == 5  # of which three for the time
    assert "| LSNet | 2 | 1,200 | 0.500 ± 0.000 | 10.0" in (tmp_path / "table.md").read_text()


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


def test_a_slow_minute_does_not_shorten_a_training(commands, tmp_path, monkeypatch):
    seconds = iter([0.5, 5.0, 0.4])
    monkeypatch.setattr(runs, "step_seconds", lambda _metrics: next(seconds, 0.5))
    rows = train_all(tmp_path, variant(budget=plan.Budget(minutes=10))).rows()
    assert [row.iterations for row in rows] == [1200]
    (report,) = tmp_path.glob("*/timings/*.json")
    assert json.loads(report.read_text())["rounds"] == [0.5, 5.0, 0.4]


def test_a_table_alone_trains_nothing(commands, tmp_path):
    """Nor does it time what has not been timed."""
    timed = variant(budget=plan.Budget(minutes=10))
    other = variant(
        "another", budget=plan.Budget(like="LSNet"), opts={"MODEL.LSNET.NUM_CONVS": "2"}
    )
    train_all(tmp_path, timed)
    trained = len(commands)
    options = {"opts": ["MODEL.DEVICE", "cpu"], "timing_iterations": None}
    trainings = runs.Trainings(tmp_path, VERSION, **options)
    comparison = compare.Comparison(trainings, (timed, other), (1,))
    trainings.prepare((timed, other))
    assert [row.name for row in comparison.rows()] == ["LSNet"]
    assert len(commands) == trained


def test_configs_that_keep_the_best_checkpoint(commands, tmp_path):
    """They want evaluations, which the short run has none of; and all are trained as long."""
    best = {"TEST.BEST_METRIC": "bbox/AP", "TEST.EVAL_PERIOD": "100", "TEST.PATIENCE": "2"}
    rows = train_all(tmp_path, variant(opts=best, budget=plan.Budget(minutes=10))).rows()
    assert [row.iterations for row in rows] == [1200]
    for command in commands:
        assert (command["TEST.BEST_METRIC"], command["TEST.PATIENCE"]) == ("", "0")


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


def test_a_training_that_starts_while_all_are_stopped_is_ended(commands, tmp_path, monkeypatch):
    ended = threading.Event()

    class Starting(FakeTraining):
        def __init__(self, command, **kwargs):
            super().__init__(command, **kwargs)
            stop = threading.Thread(target=trainings.stop)
            stop.start()
            stop.join(0.3)  # it would be over if it did not wait for this one

        def wait(self):
            return -15 if ended.wait(5) else 0

        def terminate(self):
            ended.set()

    monkeypatch.setattr(subprocess, "Popen", Starting)
    trainings = runs.Trainings(tmp_path, VERSION, opts=["MODEL.DEVICE", "cpu"])
    ours = variant(budget=plan.Budget(iterations=10))
    trainings.prepare((ours,))
    with pytest.raises(UserError, match="LSNet, seed 1: it failed"):
        trainings.train(ours, {}, 1)
    with pytest.raises(UserError, match="bbox: LSNet: stopped before it began"):
        trainings.train(ours, {}, 2)
    assert len(commands) == 1


def test_a_group_with_a_slash(commands, tmp_path):
    ours = variant(group="masks/small", name="a/b", budget=plan.Budget(iterations=10))
    (row,) = train_all(tmp_path, ours).rows()
    assert row.folder.split("/")[1].startswith("masks_small_a_b-")
    assert curves.draw_curves([row], tmp_path) == [tmp_path / "curves_masks_small.png"]
    assert (tmp_path / "curves_masks_small.png").stat().st_size > 1000


def test_configs_are_checked_before_anything_is_trained(commands, tmp_path):
    with pytest.raises(ConfigError, match="bbox: LSNet: .*SOLVER.BASE_LRR"):
        train_all(tmp_path, variant(), variant(opts={"SOLVER.BASE_LRR": "1"}))
    with pytest.raises(ConfigError, match="a table has the figures of one data set"):
        train_all(tmp_path, variant(opts={"DATASETS.TEST": "('shapes_val', 'shapes_train')"}))
    assert not commands


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

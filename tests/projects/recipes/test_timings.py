"""Short runs that are faked."""

import json

from recipes_project import VERSION, compare, plan, runs, timings, train_all, variant


def test_minutes_become_iterations_and_finished_runs_are_kept(commands, tmp_path):
    timed = variant(budget=plan.Budget(minutes=10))
    for _ in range(2):
        rows = train_all(tmp_path, timed, seeds=(1, 2)).rows()
    assert [(row.seed, row.iterations) for row in rows] == [(1, 1200), (2, 1200)]
    assert len(commands) == 5  # of which three for the time
    assert "| LSNet | 2 | 1,200 | 0.500 ± 0.000 | 10.0" in (tmp_path / "table.md").read_text()


def test_a_slow_minute_does_not_shorten_a_training(commands, tmp_path, monkeypatch):
    seconds = iter([0.5, 5.0, 0.4])
    monkeypatch.setattr(timings, "step_seconds", lambda _metrics: next(seconds, 0.5))
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
    trainings = runs.Trainings(tmp_path, VERSION, opts=["MODEL.DEVICE", "cpu"])
    comparison = compare.Comparison(trainings, (timed, other), (1,))
    trainings.prepare((timed, other), measure=False)
    assert [row.name for row in comparison.rows()] == ["LSNet"]
    assert len(commands) == trained


def test_configs_that_keep_the_best_checkpoint(commands, tmp_path):
    """They want evaluations, which the short run has none of; and all are trained as long."""
    best = {"TEST.BEST_METRIC": "bbox/AP", "TEST.EVAL_PERIOD": "100", "TEST.PATIENCE": "2"}
    rows = train_all(tmp_path, variant(opts=best, budget=plan.Budget(minutes=10))).rows()
    assert [row.iterations for row in rows] == [1200]
    for command in commands:
        assert (command["TEST.BEST_METRIC"], command["TEST.PATIENCE"]) == ("", "0")

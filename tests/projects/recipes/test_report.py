import json

from recipes_project import plan, report, rows, versions

VERSION = versions.Version(code="c0de", torch="2", detectron2="0.6", device="chip", commit="abc+")


def row(seed=1, ap=40.0, *, name="LSNet", point=(), **kwargs):
    figures = {f"segm/{figure}": 50.0 for figure in rows.FIGURES}
    scores = {**figures, "segm/AP": ap, "segm/APl": None}
    values = {
        **{"group": "masks", "name": name, "point": dict(point), "seed": seed, "diverged": False},
        **{"iterations": 1500, "step_seconds": 0.4, "peak_memory": 2048.0, "jobs": 1},
        **{"scores": scores, "version": {**vars(VERSION), "key": VERSION.key}, "folder": "f"},
        "parameters": 2_345_678,
    }
    return rows.Row(**{**values, **kwargs})


def diverged(seed):
    return row(seed, diverged=True, scores={}, step_seconds=None, peak_memory=None)


def lines(text, start):
    return [line for line in text.splitlines() if line.startswith(start)]


def test_tables_have_means_and_deviations():
    text = report.tables([row(1, 40.0), row(2, 43.0, peak_memory=4096.0)])
    assert lines(text, "| LSNet") == [
        "| LSNet | 2 | 1,500 | 0.400 ± 0.000 | 10.0 ± 0.0 | 4,096 | 2.3 "
        "| 41.5 ± 2.1 | 50.0 ± 0.0 | 50.0 ± 0.0 | 50.0 ± 0.0 | 50.0 ± 0.0 |  |"
    ]
    assert lines(text, "| masks: masks | runs | iterations | s / iteration")


def test_a_deviation_takes_two_runs_and_times_of_several_at_once_are_marked():
    (line,) = lines(report.tables([row(jobs=4)]), "| LSNet")
    assert line.startswith("| LSNet | 1 | 1,500 | 0.400\\* | 10.0\\* | 2,048 | 2.3 | 40.0 | 50.0 |")


def test_runs_that_diverged_are_counted_and_have_no_part_in_means():
    (line,) = lines(report.tables([row(1), diverged(2)]), "| LSNet")
    assert line.startswith("| LSNet | 1, 1 diverged | 1,500 | 0.400 | 10.0 | 2,048 | 2.3 | 40.0 |")
    assert "LSNet: every run diverged" in report.tables([diverged(1), diverged(2)])


def test_the_best_point_of_a_grid():
    low, high = (
        row(ap=ap, point={"SOLVER.BASE_LR": rate}) for ap, rate in [(1.0, "1"), (2.0, "2")]
    )
    lost = diverged(1)
    assert report.best_point([low, high, lost], "segm/AP") == {"SOLVER.BASE_LR": "2"}
    assert report.best_point([low, lost], "segm/AP") == {"SOLVER.BASE_LR": "1"}
    assert report.best_point([low, high], "bbox/AP") is None  # nothing was found
    variant = plan.Variant(group="masks", name="LSNet", config=None, opts={}, select="segm/AP")
    assert lines(report.grid_table(variant, [low, high]), "| BASE_LR") == [
        "| BASE_LR 1 | 1.0 |  |",
        "| BASE_LR 2 | 2.0 | taken |",
    ]


def test_rows_of_other_versions_stand_apart(tmp_path):
    old = row(ap=12.5, version={**vars(VERSION), "key": "x"})
    for folder, found in (("now", row()), ("before", old)):
        path = tmp_path / folder / "masks_lsnet-1" / "seed1"
        path.mkdir(parents=True)
        (path / "row.json").write_text(json.dumps(vars(found)))
    text = report.write_report(tmp_path, VERSION, [row()], [])
    table, apart = text.split("Of other code")
    assert "| 40.0 |" in table and "12.5" not in table
    assert "| masks: LSNet | 1 |  | 12.5 |  | code c0de (abc+), torch 2, 0.6, chip |" in apart
    assert text == (tmp_path / "table.md").read_text()
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["summary"][0]["scores"]["segm/AP"] == {"mean": 40.0, "deviation": None}
    assert [other["scores"]["segm/AP"] for other in content["others"]] == [12.5]


def test_a_version_is_code_libraries_and_device():
    def key(**values):
        return versions.Version(**{**vars(VERSION), **values}).key

    assert key(commit="other") == VERSION.key
    assert len({key(), key(code="x"), key(torch="x"), key(detectron2="x"), key(device="x")}) == 5

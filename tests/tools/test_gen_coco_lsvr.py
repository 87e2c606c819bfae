import json
import os

import pytest
from tiny_coco import run_tool, run_tool_here


def run_here(monkeypatch, *arguments):
    return run_tool_here(monkeypatch, "gen_coco_lsvr.py", *arguments)


@pytest.fixture
def coco(tmp_path):
    annotation = {"image_id": 1, "category_id": 1, "bbox": [20, 10, 40, 40], "iscrowd": 0}
    data = {
        "info": {"year": 2024},
        "images": [{"id": 1, "file_name": "a.jpg", "height": 60, "width": 100}],
        "annotations": [
            {**annotation, "id": 1, "segmentation": [[30.5, 10, 20, 25, 45, 50, 60, 35]]},
            {**annotation, "id": 2},
        ],
        "categories": [{"id": 1, "name": "fig"}],
    }
    path = tmp_path / "in.json"
    path.write_text(json.dumps(data))
    return path


def test_adds_the_points_and_keeps_the_rest(coco, tmp_path):
    output = tmp_path / "out.json"
    result = run_tool("gen_coco_lsvr.py", coco, output)
    assert result.returncode == 0, result.stderr
    assert "2 annotations, 1 of them with middles of box sides" in result.stdout
    before, after = json.loads(coco.read_text()), json.loads(output.read_text())
    points = [a.pop("extreme_points") for a in after["annotations"]]
    assert points[0] == [30, 10, 20, 25, 45, 50, 60, 35, 40, 30]
    assert points[1] == [40, 10, 20, 30, 40, 50, 60, 30, 40, 30]
    assert after == before
    assert sorted(os.listdir(tmp_path)) == ["in.json", "out.json"]


def test_overwrites_only_when_told_to(coco, monkeypatch, capsys):
    before = coco.read_text()
    assert run_here(monkeypatch, coco, coco) == 2
    assert "in.json exists" in capsys.readouterr().err
    assert coco.read_text() == before
    assert run_here(monkeypatch, coco, coco, "--overwrite") == 0
    assert all("extreme_points" in a for a in json.loads(coco.read_text())["annotations"])


def test_bad_input_leaves_nothing(coco, tmp_path, monkeypatch, capsys):
    data = json.loads(coco.read_text())
    data["annotations"][1]["segmentation"] = {"size": [5, 5], "counts": [25]}
    coco.write_text(json.dumps(data))
    missing = tmp_path / "gone.json"
    for source, target, message in (
        (coco, tmp_path / "out.json", "annotation 2: an RLE of"),
        (missing, tmp_path / "out.json", "gone.json: no such annotation file"),
        (coco, tmp_path / "nowhere" / "out.json", "no such folder"),
    ):
        assert run_here(monkeypatch, source, target) == 2
        assert message in capsys.readouterr().err
        assert os.listdir(tmp_path) == ["in.json"]


def test_boxes_that_are_none(coco, tmp_path, monkeypatch, capsys):
    data = json.loads(coco.read_text())
    data["annotations"][1]["bbox"] = {"x": 20}
    coco.write_text(json.dumps(data))
    assert run_here(monkeypatch, coco, tmp_path / "out.json") == 2
    assert "annotation 2: its box {'x': 20} is not four finite numbers" in capsys.readouterr().err


def test_output_that_is_a_folder(coco, tmp_path, monkeypatch, capsys):
    (tmp_path / "out.json").mkdir()
    assert run_here(monkeypatch, coco, tmp_path / "out.json", "--overwrite") == 2
    assert "out.json is a folder" in capsys.readouterr().err


def test_a_failing_write_keeps_the_old_file(coco, monkeypatch):
    before = coco.read_text()

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("lsnet_d2.files.require_writable", lambda folder: None)  # full later
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        run_here(monkeypatch, coco, coco, "--overwrite")
    assert coco.read_text() == before
    assert os.listdir(coco.parent) == ["in.json"]

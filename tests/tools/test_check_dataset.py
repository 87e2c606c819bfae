import json

import pytest
from own_data import write_own_data
from PIL import Image
from tiny_coco import run_tool_here


@pytest.fixture
def data(tmp_path):
    return write_own_data(tmp_path, "train", 3)


@pytest.fixture
def run(monkeypatch, capsys, data):
    """Run the tool on the data; returns its status, output and errors."""

    def run_tool(*args):
        status = run_tool_here(monkeypatch, "check_dataset.py", *data, *args)
        return status, *capsys.readouterr()

    return run_tool


def spoil(path):
    """Three problems, of which the last has no repair."""
    content = json.loads(path.read_text())
    first, second, third = content["annotations"][:3]
    first["bbox"][2] = 0
    del first["segmentation"]
    second["keypoints"] = second["keypoints"][:9]
    third["category_id"] = 99
    path.write_text(json.dumps(content))
    return content


def test_good_data(run, tmp_path):
    status, out, _ = run("--plot", tmp_path / "plot.png", "--write-config", tmp_path / "own.yaml")
    assert status == 0
    assert "train.json: problems: 0," in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    #                      objects images small medium large, sizes, masks poses crowds
    assert rows["bird"] == ["3", "3", "0", "3", "0", "37", "37", "37", "3", "3", "0"]
    assert rows["ball"][-2:] == ["0", "0"]
    assert "exchanged in a mirrored image: left_wing - right_wing, left_foot - right_foot" in out
    assert "5 keypoints, labelled in so many objects: nose 3, left_wing 3" in out
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.format == "PNG" and len(picture.getcolors(1 << 20)) > 10
    assert "NUM_KEYPOINTS: 5" in (tmp_path / "own.yaml").read_text()


def test_problems_are_listed_and_repaired(run, data, tmp_path):
    path = data[0]
    content = spoil(path)
    config, fixed = tmp_path / "own.yaml", tmp_path / "fixed.json"
    status, out, _ = run("--write-config", config)
    assert status == 1 and not config.exists()
    assert "annotation 1 of image 000.jpg: its box" in out
    assert "annotation 2 of image 000.jpg: 9 numbers of keypoints, not 15 [no keypoints]" in out
    assert "annotation 3 of image 000.jpg: category 99 is not in the list of categories\n" in out
    assert "own.yaml is not written; problems left: 4" in out

    status, out, _ = run("--fix", fixed, "--write-config", config)
    assert status == 1 and "own.yaml is not written; problems left: 1" in out
    assert json.loads(path.read_text()) == content
    assert len(json.loads(fixed.read_text())["annotations"]) == 8

    content["annotations"][2]["category_id"] = 40
    path.write_text(json.dumps(content))
    status, out, _ = run("--fix", fixed, "--write-config", config, "--overwrite")
    assert status == 0
    assert str(fixed) in config.read_text()


def test_lists_that_cannot_be_used(run, data):
    content = json.loads(data[0].read_text())
    data[0].write_text(json.dumps({**content, "categories": []}))
    status, out, _ = run()
    assert status == 1
    assert "file: there are no categories" in out and "no statistics" in out


def test_evaluation_on_other_data(run, tmp_path):
    val = write_own_data(tmp_path, "val", 1)
    assert run("--write-config", tmp_path / "own.yaml", "--val", *val)[0] == 0
    assert str(val[0]) in (tmp_path / "own.yaml").read_text()
    val[0].write_text(val[0].read_text().replace('"bbox": [', '"bbox": [9000, '))
    status, out, _ = run("--write-config", tmp_path / "other.yaml", "--val", *val)
    assert status == 1 and not (tmp_path / "other.yaml").exists()
    assert "train.json: problems: 0," in out and "val.json: problems: 3, that a check of" in out
    status, _, err = run("--val", *val)
    assert status == 2 and "give --write-config" in err


def test_user_errors(run, data, tmp_path):
    status, _, err = run("--fix", data[0])
    assert status == 2 and "train.json exists: give --overwrite" in err
    status, _, err = run("--fix", data[0], "--overwrite")
    assert status == 2 and "is DATA.json itself" in err
    status, _, err = run("--plot", tmp_path / "nowhere" / "a.png")
    assert status == 2 and "no such folder" in err
    args = ("--write-config", tmp_path / "own.yaml", "--val", data[0], tmp_path / "gone")
    status, _, err = run(*args)
    assert status == 2 and "no folder of images" in err
    status, _, err = run("--base-config", "gone.yaml")
    assert status == 2 and "--base-config gone.yaml: no such config file" in err
    data[0].write_text("[")
    status, _, err = run()
    assert status == 2 and "train.json: not a complete JSON file" in err

import json

import pytest
from tiny_coco import run_tool

IMAGE = {"id": 1, "file_name": "a.jpg", "height": 60, "width": 100}
BOX = {"image_id": 1, "bbox": [20, 10, 40, 40]}


@pytest.fixture
def files(tmp_path):
    instances = {
        "images": [IMAGE],
        "categories": [{"id": 1, "name": "cup"}, {"id": 5, "name": "person"}],
        "annotations": [
            {**BOX, "id": 10, "category_id": 1},
            {**BOX, "id": 11, "category_id": 5},
            {**BOX, "id": 12, "category_id": 5},
        ],
    }
    person = {"id": 1, "name": "person", "keypoints": ["nose", "tail"], "skeleton": [[1, 2]]}
    keypoints = {
        "images": [IMAGE],
        "categories": [person],
        "annotations": [
            {**BOX, "id": 12, "category_id": 1, "keypoints": [30, 20, 2, 0, 0, 0]},
        ],
    }
    paths = [tmp_path / name for name in ("instances.json", "keypoints.json", "joint.json")]
    paths[0].write_text(json.dumps(instances))
    paths[1].write_text(json.dumps(keypoints))
    return paths


def test_adds_keypoints_and_skeleton(files):
    result = run_tool("merge_coco_keypoints.py", *files)
    assert result.returncode == 0, result.stderr
    assert "3 annotations, 1 of them with keypoints" in result.stdout
    merged = json.loads(files[2].read_text())
    assert [a.get("keypoints") for a in merged["annotations"]] == [None, None, [30, 20, 2, 0, 0, 0]]
    assert merged["annotations"][2]["num_keypoints"] == 1
    assert merged["categories"][1] == {
        "id": 5,
        "name": "person",
        "keypoints": ["nose", "tail"],
        "skeleton": [[1, 2]],
    }


def test_objects_that_do_not_fit_are_named_and_nothing_is_written(files):
    data = json.loads(files[1].read_text())
    data["annotations"][0]["id"] = 10  # a cup
    files[1].write_text(json.dumps(data))
    result = run_tool("merge_coco_keypoints.py", *files)
    assert result.returncode == 2
    assert "keypoints.json: annotation 10" in result.stderr and "Traceback" not in result.stderr
    assert not files[2].exists()


def test_keeps_an_existing_file(files):
    files[2].write_text("mine")
    result = run_tool("merge_coco_keypoints.py", *files)
    assert result.returncode == 2 and "--overwrite" in result.stderr
    assert files[2].read_text() == "mine"

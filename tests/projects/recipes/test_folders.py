import ast
import json

import pytest
from recipes_project import folders, plan

from lsnet_d2.errors import UserError

DATA = plan.DataKey(name="people", annotations="person_keypoints")


def write(folder, *, images="images", suffix="", category="person"):
    (folder / "annotations").mkdir(parents=True)
    for split in folders.SPLITS:
        (folder / images.format(split=split)).mkdir(exist_ok=True)
        content = {
            "images": [{"id": 5, "file_name": "a.jpg", "height": 4, "width": 4}],
            "annotations": [
                {"id": 9, "image_id": 5, "category_id": 1, "bbox": [0, 0, 2, 2]},
                {"id": 8, "image_id": 6, "category_id": 1, "bbox": [0, 0, 2, 2]},  # of no image
            ],
            "categories": [{"id": 1, "name": category}],
        }
        path = folder / "annotations" / f"person_keypoints_{split}{suffix}.json"
        path.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("images", "suffix"), [("images", ""), ("{split}", ""), ("{split}2017", "2017")]
)
def test_layouts(tmp_path, images, suffix):
    folder = write(tmp_path / "data", images=images, suffix=suffix)
    key, value = folders.data_opts([folder], DATA, tmp_path / "out")
    assert key == "DATASETS.COCO_FILES" and not (tmp_path / "out").exists()
    for split, entry in zip(folders.SPLITS, ast.literal_eval(value), strict=True):
        json_file = folder / "annotations" / f"person_keypoints_{split}{suffix}.json"
        assert entry == [
            f"people_{split}",
            str(json_file),
            str(folder / images.format(split=split)),
        ]


def test_several_folders_are_put_together(tmp_path):
    parts = [write(tmp_path / name) for name in ("one", "two")]
    _, value = folders.data_opts(parts, DATA, tmp_path / "out")
    entry = ast.literal_eval(value)[1]
    assert entry[:2] == ["people_val", str(tmp_path / "out" / "val.json")]
    data = json.loads((tmp_path / "out" / "val.json").read_text())
    assert [(i["id"], i["file_name"]) for i in data["images"]] == [
        (1, str(parts[0] / "images/a.jpg")),
        (2, str(parts[1] / "images/a.jpg")),
    ]
    assert [(a["id"], a["image_id"]) for a in data["annotations"]] == [(1, 1), (2, 2)]


def test_other_folders_to_test_on(tmp_path):
    one, two = (write(tmp_path / name) for name in ("one", "two"))
    for val, expected in (([two], two), ([], one)):
        _, value = folders.data_opts([one], DATA, tmp_path / "out", val=val)
        train, test = ast.literal_eval(value)
        assert train[1:] == [
            str(one / "annotations/person_keypoints_train.json"),
            str(one / "images"),
        ]
        assert test[1:] == [
            str(expected / "annotations/person_keypoints_val.json"),
            str(expected / "images"),
        ]
    assert not (tmp_path / "out").exists()


def test_what_is_missing_or_does_not_fit_is_named(tmp_path):
    with pytest.raises(UserError, match="none: no annotations/person_keypoints_train.json"):
        folders.data_opts([tmp_path / "none"], DATA, tmp_path)
    one = write(tmp_path / "one")
    two = write(tmp_path / "two", category="cat")
    with pytest.raises(UserError, match="two/.*: its categories are not those of .*one"):
        folders.data_opts([one, two], DATA, tmp_path / "out")
    (one / "images").rmdir()
    with pytest.raises(UserError, match="there is neither .*one/train nor .*one/images"):
        folders.data_opts([one], DATA, tmp_path / "out")

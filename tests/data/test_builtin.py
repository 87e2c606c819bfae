import json
import logging

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from lsnet_d2.data.builtin import explain_unregistered, register_coco_files, register_folders
from lsnet_d2.errors import ConfigError


@pytest.fixture
def folders(tmp_path):
    """One data set in COCO's layout, and an annotation file without images."""
    annotations = tmp_path / "fruits" / "annotations"
    annotations.mkdir(parents=True)
    (tmp_path / "fruits" / "train").mkdir()
    data = {
        "images": [{"id": 7, "file_name": "a.jpg", "height": 40, "width": 60}],
        "categories": [{"id": 3, "name": "nut"}, {"id": 1, "name": "date"}],
        "annotations": [
            {
                "id": 5,
                "image_id": 7,
                "category_id": 3,
                "bbox": [1, 2, 10, 20],
                "extreme_points": [6, 2, 1, 9, 5, 22, 11, 12],
            }
        ],
    }
    (annotations / "instances_train.json").write_text(json.dumps(data))
    (annotations / "instances_other.json").write_text("{}")
    yield tmp_path
    for name in [n for n in DatasetCatalog.list() if n.startswith("fruits_")]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_folders_in_cocos_layout_are_registered(folders, caplog):
    assert register_folders(folders) == ["fruits_train"]
    assert register_folders(folders) == []  # it is there already
    assert not caplog.text
    (record,) = DatasetCatalog.get("fruits_train")
    assert record["file_name"] == str(folders / "fruits" / "train" / "a.jpg")
    (annotation,) = record["annotations"]
    assert annotation["category_id"] == 1 and len(annotation["extreme_points"]) == 8
    assert MetadataCatalog.get("fruits_train").thing_classes == ["date", "nut"]


def test_what_a_folder_lacks_is_named(folders, monkeypatch):
    fruits = folders / "fruits"
    assert explain_unregistered("fruits_other", folders).endswith(f"images {fruits / 'other'}")
    assert explain_unregistered("fruits_val", folders).endswith(
        f"annotation file {fruits / 'annotations' / 'instances_val.json'}"
    )
    (fruits / "annotations" / "person_keypoints_val.json").write_text("{}")
    assert explain_unregistered("fruits_keypoints_val", folders).endswith(f"{fruits / 'val'}")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(folders))
    text = explain_unregistered("nuts_val")
    assert str(folders) in text and "{name}/annotations/instances_{split}.json" in text


def test_a_name_of_another_data_set_is_not_taken_in_silence(folders, caplog):
    (folders / "fruits").rename(folders / "coco_2017")
    before = MetadataCatalog.get("coco_2017_train").json_file
    with caplog.at_level(logging.WARNING, logger="lsnet_d2"):
        assert register_folders(folders) == []
    assert "name coco_2017_train stands for another data set" in caplog.text
    assert str(folders / "coco_2017" / "annotations" / "instances_train.json") in caplog.text
    assert MetadataCatalog.get("coco_2017_train").json_file == before


def test_a_folder_that_is_not_there(tmp_path):
    assert register_folders(tmp_path / "nowhere") == []


def test_files_of_a_config(folders, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lsnet_d2"), "propagate", True)
    json_file = str(folders / "fruits" / "annotations" / "instances_train.json")
    images = str(folders / "fruits" / "train")
    for _ in range(2):  # a config is loaded more than once
        register_coco_files([["fruits_own", json_file, images]])
    assert len(DatasetCatalog.get("fruits_own")) == 1
    assert MetadataCatalog.get("fruits_own").thing_classes == ["date", "nut"]
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    register_coco_files([["fruits_own", json_file, str(folders)]])
    assert f"fruits_own is {json_file} now" in caplog.text
    (record,) = DatasetCatalog.get("fruits_own")
    assert record["file_name"] == str(folders / "a.jpg")


@pytest.mark.parametrize("entry", ["fruits_own", ["fruits_own", "a.json"], ["fruits_own", 1, 2], 5])
def test_malformed_files_of_a_config(entry):
    with pytest.raises(ConfigError, match="DATASETS.COCO_FILES must list .name, annotation file"):
        register_coco_files([entry])

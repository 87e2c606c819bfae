import logging

import pytest
import tiny_coco
from detectron2.data import DatasetCatalog, MetadataCatalog
from own_data import KEYPOINTS, write_own_data

from lsnet_d2.data.catalog import class_name, load_metadata, reporting_data_errors
from lsnet_d2.data.coco_json import register_lsnet_instances
from lsnet_d2.errors import UserError


def test_data_errors_of_the_system_and_of_other_loaders():
    def message(error):
        with pytest.raises(UserError) as error_info, reporting_data_errors(["some"]):
            raise error
        return str(error_info.value)

    assert "some: /x: Not a directory" in message(NotADirectoryError(20, "Not a directory", "/x"))
    assert "some: /x: File exists" in message(FileExistsError(17, "File exists", "/x"))
    assert "some: no weights here (" in message(FileNotFoundError("no weights here"))
    assert message(KeyError("width")) == "data set some: KeyError: 'width'"
    with pytest.raises(AttributeError), reporting_data_errors(["some"]):  # a bug
        raise AttributeError


@pytest.fixture
def data_set(tmp_path):
    """Folder and name of a registered data set that has not been read."""
    tiny_coco.write_coco(tmp_path)
    json_file = tiny_coco.json_file(tmp_path, "val")
    register_lsnet_instances("unread_val", json_file, tmp_path / "coco" / "val2017")
    yield tmp_path, "unread_val"
    DatasetCatalog.remove("unread_val")
    MetadataCatalog.pop("unread_val")


def test_names_of_classes_are_read(data_set):
    assert load_metadata(data_set[1]).thing_classes[0] == "person"


def test_ids_and_keypoints_are_read_where_classes_have_names(tmp_path):
    path, images = write_own_data(tmp_path, "val", 1)
    register_lsnet_instances("named", path, images, {"thing_classes": ["ball", "bird", "box"]})
    metadata = load_metadata("named")
    assert metadata.thing_dataset_id_to_contiguous_id == {10: 0, 20: 1, 40: 2}
    assert metadata.keypoint_names == KEYPOINTS
    DatasetCatalog.remove("named")
    MetadataCatalog.pop("named")


def test_ids_that_cannot_be_read_are_not_needed(tmp_path, caplog):
    register_lsnet_instances("gone", tmp_path / "a.json", tmp_path, {"thing_classes": ["ball"]})
    with caplog.at_level(logging.WARNING):
        assert load_metadata("gone").thing_classes == ["ball"]
    assert "No ids of categories: " in caplog.text and "a.json: no such" in caplog.text
    DatasetCatalog.remove("gone")
    MetadataCatalog.pop("gone")


def test_names_that_are_known_otherwise_need_no_reading():
    DatasetCatalog.register("no_file", lambda: pytest.fail("read"))
    MetadataCatalog.get("no_file").set(thing_classes=["ball"])
    assert class_name(load_metadata("no_file"), 0) == "ball"
    assert class_name(MetadataCatalog.get("no_file"), 1) == "1"
    DatasetCatalog.remove("no_file")
    MetadataCatalog.pop("no_file")


@pytest.mark.parametrize("damage", ["missing", "truncated", "folder"])
def test_names_of_classes_that_cannot_be_read_are_not_needed(data_set, damage, caplog):
    folder, name = data_set
    path = tiny_coco.json_file(folder, "val")
    text = path.read_text()
    path.unlink()
    if damage == "truncated":
        path.write_text(text[:100])
    elif damage == "folder":
        path.mkdir()
    with caplog.at_level(logging.WARNING):
        metadata = load_metadata(name)
    assert metadata.get("thing_classes") is None
    assert "No names of classes: " in caplog.text and str(path) in caplog.text


def test_a_data_set_that_is_not_registered(caplog):
    with caplog.at_level(logging.WARNING):
        assert load_metadata("not_registered").get("thing_classes") is None
    MetadataCatalog.pop("not_registered")
    assert "data set 'not_registered' is not registered: no folder" in caplog.text

import contextlib
import copy
import json
import logging

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from pycocotools import mask as mask_util

from lsnet_d2.data.annotation_checks import AnnotationError
from lsnet_d2.data.coco_json import (
    coco_extreme_points,
    load_lsnet_json,
    read_coco_json,
    register_lsnet_instances,
)

POLYGON = [30, 10, 20, 25, 45, 50, 60, 35]


@pytest.fixture(autouse=True)
def _logs_reach_caplog(monkeypatch):
    # Detectron2's setup_logger, which other tests call, cuts the connection
    monkeypatch.setattr(logging.getLogger("lsnet_d2"), "propagate", True)


def rle():
    mask = np.zeros((60, 100), np.uint8, order="F")
    mask[10:50, 20:60] = 1
    coded = mask_util.encode(mask)
    return {**coded, "counts": coded["counts"].decode()}


@pytest.fixture
def data():
    """Ids are not in order, categories have gaps."""
    return {
        "images": [
            {"id": 9, "file_name": "b.jpg", "height": 60, "width": 100},
            {"id": 4, "file_name": "a.jpg", "height": 60, "width": 100},
        ],
        "annotations": [
            {
                "id": 1,
                "image_id": 9,
                "category_id": 7,
                "bbox": [20, 10, 40, 40],
                "iscrowd": 0,
                "segmentation": [POLYGON],
                "keypoints": [30, 10, 2, 0, 0, 0],
            },
            {
                "id": 2,
                "image_id": 4,
                "category_id": 3,
                "bbox": [20, 10, 40, 40],
                "iscrowd": 0,
                "segmentation": rle(),
            },
            {
                "id": 3,
                "image_id": 9,
                "category_id": 3,
                "bbox": [0, 0, 100, 60],
                "iscrowd": 1,
                "segmentation": {"size": [60, 100], "counts": [0, 6000]},
            },
        ],
        "categories": [{"id": 7, "name": "nut"}, {"id": 3, "name": "fig"}],
    }


def write(tmp_path, data, name="instances.json"):
    path = tmp_path / name
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return str(path)


def test_equals_detectron2s_loader_and_adds_ids(tmp_path, data):
    file = write(tmp_path, data)
    ours = load_lsnet_json(file, "images", "loaded by us")
    theirs = load_coco_json(file, "images", "loaded by detectron2", ["id"])
    assert ours == theirs
    assert [record["image_id"] for record in ours] == [4, 9]
    assert [a["id"] for a in ours[1]["annotations"]] == [1, 3]
    metadata = [MetadataCatalog.get(f"loaded by {who}") for who in ("us", "detectron2")]
    for key in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
        assert metadata[0].get(key) == metadata[1].get(key)
    assert metadata[0].thing_classes == ["fig", "nut"]


def test_keeps_what_detectron2_drops_or_refuses(tmp_path, data):
    first, second, third = data["annotations"]
    first["extreme_points"] = list(range(10))
    second["segmentation"] = [[1, 2, 3, 4]]
    third["ignore"], third["iscrowd"] = 1, 0
    records = load_lsnet_json(write(tmp_path, data), "images", "loaded with more")
    kept = {a["id"]: a for record in records for a in record["annotations"]}
    assert kept[1]["extreme_points"] == list(range(10))
    assert kept[2]["segmentation"] == [[1, 2, 3, 4]]
    assert kept[3]["ignore"] == kept[3]["iscrowd"] == 1  # Detectron2's mappers know the latter


def test_registered_under_a_name(tmp_path, data):
    file = write(tmp_path, data)
    register_lsnet_instances("figs", file, tmp_path, {"thing_colors": [(1, 2, 3), (4, 5, 6)]})
    try:
        assert len(DatasetCatalog.get("figs")) == 2
    finally:
        DatasetCatalog.remove("figs")
    metadata = MetadataCatalog.get("figs")
    assert (metadata.json_file, metadata.evaluator_type) == (file, "coco")
    assert metadata.thing_classes == ["fig", "nut"] and len(metadata.thing_colors) == 2


def test_other_classes_than_registered(tmp_path, data):
    MetadataCatalog.get("two others").set(thing_classes=["cat", "dog"])
    with pytest.raises(AnnotationError, match="instances.json: its 2 categories are not the 2"):
        load_lsnet_json(write(tmp_path, data), "images", "two others")


def test_missing_file(tmp_path):
    with pytest.raises(AnnotationError, match="gone.json: no such annotation file"):
        read_coco_json(tmp_path / "gone.json")
    with pytest.raises(AnnotationError, match="Is a directory"):
        read_coco_json(tmp_path)


@pytest.mark.parametrize(
    ("key", "name", "value", "message"),
    [
        ("images", "id", [1], r"\[1\] of 'images': id is \[1\], not a number or text"),
        ("images", "id", float("nan"), "id is nan, not a number or text"),
        ("images", "id", True, "id is True, not a number or text"),
        ("images", "id", "a", "some ids of 'images' are numbers and some are text"),
        ("images", "file_name", 3, "9 of 'images': file_name is 3, not the name of a file"),
        ("images", "file_name", "a\0", "not the name of a file"),
        ("images", "file_name", "\ud800", "not the name of a file"),
        ("images", "height", "60", "height is '60', not a size in pixels"),
        ("images", "width", 0, "width is 0, not a size in pixels"),
        ("annotations", "image_id", {}, "1 of 'annotations': image_id is {}, not a number"),
        (
            "annotations",
            "category_id",
            [[2] * 99],
            r"category_id is \[\[2, 2.*\.\.\., not a number",
        ),
        ("categories", "name", None, "of 'categories': name is None, not text"),
    ],
)
def test_values_of_another_kind(tmp_path, data, key, name, value, message):
    data[key][0][name] = value
    with pytest.raises(AnnotationError, match=f"(?s)instances.json: .*{message}"):
        read_coco_json(write(tmp_path, data))


@pytest.mark.parametrize("value", [3, 0.5, "abc", {}, [1e300, 1, 2], [1, 2, "2"]])
def test_keypoints_that_are_none(tmp_path, data, value):
    data["annotations"][0]["keypoints"] = value
    message = "annotation 1 of b.jpg: its keypoints are not finite triples"
    with pytest.raises(AnnotationError, match=message) if value else contextlib.nullcontext():
        load_lsnet_json(write(tmp_path, data), "images", "none of keypoints")


def test_lists_within_lists(tmp_path):
    path = tmp_path / "instances.json"
    path.write_text('{"images": ' + "[" * 100_000)
    with pytest.raises(AnnotationError, match="instances.json: lists within lists without end"):
        read_coco_json(path)


@pytest.mark.parametrize("text", ["", '{"images": [', "[1, 2", "\x80"])
def test_incomplete_file(tmp_path, text):
    with pytest.raises(AnnotationError, match="instances.json: not a complete JSON file"):
        read_coco_json(write(tmp_path, text))


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_missing_list(tmp_path, data, key):
    del data[key]
    with pytest.raises(AnnotationError, match=f"not in COCO's format: no list '{key}'"):
        read_coco_json(write(tmp_path, data))


def test_not_coco(tmp_path):
    with pytest.raises(AnnotationError, match="not in COCO's format: a list"):
        read_coco_json(write(tmp_path, "[]"))


@pytest.mark.parametrize(
    ("where", "key", "message"),
    [
        ("annotations", "bbox", "entry 1 of 'annotations' has no 'bbox'"),
        ("annotations", "id", "entry number 0 of 'annotations' has no 'id'"),
        ("images", "width", "entry 9 of 'images' has no 'width'"),
        ("categories", "name", "entry 7 of 'categories' has no 'name'"),
    ],
)
def test_missing_key(tmp_path, data, where, key, message):
    del data[where][0][key]
    with pytest.raises(AnnotationError, match=f"(?s)instances.json.*{message}"):
        read_coco_json(write(tmp_path, data))


@pytest.mark.parametrize("where", ["images", "annotations", "categories"])
def test_repeated_id(tmp_path, data, where):
    repeated = copy.deepcopy(data[where][0])
    data[where].append(repeated)
    with pytest.raises(AnnotationError, match=f"id {repeated['id']} occurs 2 times in '{where}'"):
        read_coco_json(write(tmp_path, data))


def test_unknown_category(tmp_path, data):
    data["annotations"][2]["category_id"] = 5
    with pytest.raises(
        AnnotationError, match="(?s)instances.json.*annotation 3 of image 9: category 5"
    ):
        load_lsnet_json(write(tmp_path, data), "images", "unknown category")


def test_malformed_mask_and_keypoints(tmp_path, data):
    data["annotations"][2]["segmentation"]["counts"] = [5]
    data["annotations"][0]["keypoints"] = [1, 2]
    with pytest.raises(AnnotationError) as error:
        load_lsnet_json(write(tmp_path, data), "images", "malformed")
    assert "annotation 3 of b.jpg: the counts of an RLE" in str(error.value)
    assert "annotation 1 of b.jpg: its keypoints" in str(error.value)


def test_annotations_of_other_images_are_left_out_and_counted(tmp_path, data, caplog):
    data["annotations"][0]["image_id"] = 1000
    records = load_lsnet_json(write(tmp_path, data), "images", "a part of it")
    assert sum(len(record["annotations"]) for record in records) == 2
    assert "1 annotations of images that are not in it" in caplog.text


def test_extreme_points_in_the_released_form(data):
    polygon, mask, _ = data["annotations"]
    # the box's centre comes last; flat coordinates are rounded down
    polygon["segmentation"] = [[30.75, 10, 20, 25.25, 45, 50, 60, 35]]
    expected = [30, 10, 20, 25, 45, 50, 60, 35, 40, 30]
    assert coco_extreme_points(polygon, 60, 100) == expected
    outline = [40, 10, 20, 30, 40, 50, 60, 30, 40, 30]
    assert coco_extreme_points(mask, 60, 100) == outline
    # indices of pixels in reading order, of which the last comes before the first
    pixels = [39, 10, 20, 10, 59, 49, 59, 49, 40, 30]
    assert coco_extreme_points(mask, 60, 100, masks="pixels") == pixels


def test_extreme_points_without_segmentation(data):
    annotation = data["annotations"][0]
    del annotation["segmentation"]
    middles = [40, 10, 20, 30, 40, 50, 60, 30, 40, 30]
    assert coco_extreme_points(annotation, 60, 100) == middles
    annotation["bbox"] = [1, 2, 3]
    with pytest.raises(ValueError, match="not four finite numbers"):
        coco_extreme_points(annotation, 60, 100)

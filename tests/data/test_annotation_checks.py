import copy
import json
import logging
import time

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode

from lsnet_d2.data.annotation_checks import (
    AnnotationError,
    check_dataset_dicts,
    name_annotation,
    read_boxes,
)
from lsnet_d2.errors import UserError

NAME = "data of the annotation checks"


@pytest.fixture(autouse=True)
def _logs_reach_caplog(monkeypatch):
    # Detectron2's setup_logger, which other tests call, cuts the connection
    monkeypatch.setattr(logging.getLogger("lsnet_d2"), "propagate", True)


@pytest.fixture
def dicts(tmp_path):
    """Two images of 100 x 60 with two objects each, ids 10, 11, 20, 21."""
    records = []
    for number in (1, 2):
        file = tmp_path / f"{number}.jpg"
        file.touch()
        objects = [
            {
                "id": 10 * number + index,
                "bbox": [10.0, 10, 20, 20],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": index,
                "segmentation": [[10, 10, 30, 10, 30, 30]],
            }
            for index in range(2)
        ]
        records.append(
            {
                "file_name": str(file),
                "image_id": number,
                "height": 60,
                "width": 100,
                "annotations": objects,
            }
        )
    return records


def check(dicts, **options):
    return check_dataset_dicts(dicts, **{"num_classes": 2, "dataset_name": NAME, **options})


def test_sound_data_pass_unchanged(dicts):
    before = copy.deepcopy(dicts)
    assert check(dicts) is dicts
    assert dicts == before
    assert check([]) == []


@pytest.mark.parametrize(
    "box",
    [[-5, -5, 30, 30], [90, 50, 20, 20], [99.99, 0, 0.02, 1], [-500, -500, 2000, 2000]],
)
def test_boxes_that_reach_over_the_border_pass(dicts, box):
    dicts[1]["annotations"][0]["bbox"] = box
    check(dicts)


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([10, 10, 0, 20], "no width or no height"),
        ([10, 10, 20, 0], "no width or no height"),
        ([10, 10, -4, 20], "no width or no height"),
        ([100, 10, 20, 20], "outside its image of 100 x 60 pixels"),
        ([10, 60, 20, 20], "outside its image"),
        ([-30, 10, 30, 20], "outside its image"),
        ([10, 10, float("nan"), 20], "not four finite numbers"),
        ([10, 10, float("inf"), 20], "not four finite numbers"),
        ([0, 0, 2**63, 20], "beyond all images"),
        ([-1e300, 0, 2e300, 20], "beyond all images"),
        ([10, 10, 20], "not four finite numbers"),
        ([], "not four finite numbers"),
        (None, "not four finite numbers"),
        ("box", "not four finite numbers"),
        (["10", "10", "20", "20"], "not four finite numbers"),
        ({"x": 10}, "not four finite numbers"),
    ],
)
def test_invalid_box_names_data_set_image_and_annotation(dicts, box, reason):
    dicts[1]["annotations"][0]["bbox"] = box
    with pytest.raises(AnnotationError) as error:
        check(dicts)
    message = str(error.value)
    assert NAME in message and "annotation 20 of image" in message and "2.jpg" in message
    assert reason in message and "a problem:" in message
    assert "DATASETS.INVALID_ANNOTATIONS" in message


def test_boxes_of_two_corners(dicts):
    dicts[0]["annotations"][0].update(bbox=[30, 10, 50, 60], bbox_mode=BoxMode.XYXY_ABS)
    check(dicts)
    dicts[0]["annotations"][0]["bbox"] = [30, 10, 30, 60]
    with pytest.raises(AnnotationError, match="annotation 10 .*no width"):
        check(dicts)
    dicts[0]["annotations"][0].update(bbox=[30, 10, 50, 60, 9], bbox_mode=BoxMode.XYWHA_ABS)
    with pytest.raises(AnnotationError, match="annotation 10 .*neither XYWH_ABS nor XYXY_ABS"):
        check(dicts)


def test_drop_leaves_out_invalid_boxes_and_names_them(dicts, caplog):
    dicts[1]["annotations"][0]["bbox"] = [10, 10, 0, 20]
    before = copy.deepcopy(dicts)
    with caplog.at_level(logging.WARNING, logger="lsnet_d2"):
        kept = check(dicts, on_invalid="drop")
    assert dicts == before
    assert [a["id"] for record in kept for a in record["annotations"]] == [10, 11, 21]
    assert kept[0] is dicts[0]
    assert "1 annotations with invalid boxes dropped" in caplog.text
    assert f"annotation 20 of image {dicts[1]['file_name']}: its box [10, 10, 0, 20]" in caplog.text


def test_drop_does_not_hide_other_problems(dicts):
    dicts[1]["annotations"][0]["bbox"] = [10, 10, 0, 20]
    dicts[0]["annotations"][1]["category_id"] = 2
    with pytest.raises(AnnotationError, match="annotation 11 .*class 2 is not one of 0 to 1"):
        check(dicts, on_invalid="drop")
    with pytest.raises(ValueError, match="on_invalid"):
        check(dicts, on_invalid="ignore")


def test_many_problems_are_counted_and_the_first_listed(dicts):
    many = []
    for number in range(7):
        record = copy.deepcopy(dicts[0])
        for index, annotation in enumerate(record["annotations"]):
            annotation.update(id=100 + 2 * number + index, bbox=[0, 0, 0, 0])
        many.append(record)
    with pytest.raises(AnnotationError) as error:
        check(many)
    message = str(error.value)
    assert "14 problems" in message and "9 more" in message
    assert "annotation 104 " in message and "annotation 105 " not in message


def test_missing_image(dicts, tmp_path):
    dicts[1]["file_name"] = str(tmp_path / "gone.jpg")
    with pytest.raises(AnnotationError, match="(?s)a problem.*no image file .*gone.jpg"):
        check(dicts)
    dicts[1]["file_name"] = str(tmp_path / "nowhere" / "1.jpg")
    with pytest.raises(AnnotationError, match="no folder of images .*nowhere"):
        check(dicts)
    dicts[1]["file_name"] = "https://example.org/1.jpg"
    check(dicts)


@pytest.mark.parametrize("category", [2, -1, None, 0.5])
def test_class_out_of_range(dicts, category):
    dicts[1]["annotations"][1]["category_id"] = category
    with pytest.raises(AnnotationError, match="annotation 21 of image .*2.jpg: its class"):
        check(dicts)


def test_number_of_classes(dicts):
    name = "three classes"
    MetadataCatalog.get(name).set(thing_classes=["a", "b", "c"], json_file="three.json")
    with pytest.raises(
        AnnotationError,
        match=r"three classes \(three.json\) has 3 classes \(a, b, c\), but MODEL.X.CLASSES is 2",
    ):
        check(dicts, dataset_name=["unknown", name], num_classes_key="MODEL.X.CLASSES")
    check(dicts, dataset_name=name, num_classes=3)
    assert "unknown" not in MetadataCatalog.list()


def test_ids_that_a_loader_lost_are_found_in_the_file(dicts, tmp_path):
    file = tmp_path / "instances.json"
    dicts[1]["annotations"][0]["bbox"] = [10, 10, 0, 20]
    annotations = [
        {"id": a.pop("id"), "image_id": record["image_id"], "bbox": a["bbox"]}
        for record in dicts
        for a in record["annotations"]
    ]
    file.write_text(json.dumps({"annotations": annotations}))
    MetadataCatalog.get("without ids").set(json_file=str(file))
    with pytest.raises(AnnotationError, match="(?s)instances.json.*annotation 20 of image"):
        check(dicts, dataset_name="without ids")
    with pytest.raises(AnnotationError, match="annotation number 0 of image .*2.jpg"):
        check(dicts)


def test_extreme_points(dicts):
    with pytest.raises(AnnotationError, match="4 problems"):
        check(dicts, need_extreme_points=True)
    dicts[0]["annotations"][0]["extreme_points"] = list(range(8))
    dicts[0]["annotations"][1]["iscrowd"] = 1
    del dicts[1]["annotations"][0]["segmentation"]
    dicts[1]["annotations"][1]["extreme_points"] = list(range(10))
    check(dicts, need_extreme_points=True)
    dicts[1]["annotations"][1]["extreme_points"] = [1, 2, 3]
    with pytest.raises(AnnotationError, match="annotation 21 .*four or five points"):
        check(dicts)


@pytest.mark.parametrize(
    "segmentation, message",
    [
        ("outline", "type str"),
        ([10, 10, 30, 10, 30, 30], "a flat list of numbers"),
        ([[10, 10, 30, 10, 30, 30, 7]], "a polygon of 7 numbers"),
        ({"size": [100, 60], "counts": "x"}, r"an RLE .*\[100, 60\] in an image of \[60, 100\]"),
        ({"counts": "x"}, r"an RLE of \(height, width\) None"),
    ],
)
def test_segmentations(dicts, segmentation, message):
    dicts[0]["annotations"][0]["segmentation"] = {"size": [60, 100], "counts": "not decoded"}
    dicts[0]["annotations"][1]["segmentation"] = None
    check(dicts)
    dicts[1]["annotations"][0]["segmentation"] = segmentation
    with pytest.raises(AnnotationError, match=f"annotation 20 of image .*2.jpg: .*{message}"):
        check(dicts)


@pytest.mark.parametrize(
    ("keypoints", "message"),
    [
        ([1, 2, 2, 3, 4, 2, 5, 6, 2], "9 numbers of keypoints, not 6"),
        (np.array([[1, 2, 2], [np.nan, 4, 2]]), "its keypoints are not finite triples"),
        ([1, 2, 2, 3], "its keypoints are not finite triples"),
        ([[1, 2, 2], [3, 4]], "its keypoints are not finite triples"),
        ([[1, 2, 2], [3, 4, "seen"]], "its keypoints are not finite triples"),
    ],
)
def test_keypoints(dicts, keypoints, message):
    dicts[1]["annotations"][0]["keypoints"] = keypoints
    with pytest.raises(AnnotationError, match=message) as error:
        check(dicts, num_keypoints=2)
    assert "2.jpg" in str(error.value)
    check(dicts)  # of no concern to a model without
    for none in ([], None):
        dicts[1]["annotations"][0]["keypoints"] = none
        check(dicts, num_keypoints=2)


def test_boxes_as_they_stand_in_files():
    boxes, problems = read_boxes([[1, 2, 3, 4], [5.5, 6, 7, 8]])
    assert boxes.tolist() == [[1, 2, 3, 4], [5.5, 6, 7, 8]] and problems == {}
    boxes, problems = read_boxes([[1, 2, 3, 4], None, [1, 2, 3], [1, float("nan"), 2, 3]])
    assert boxes[0].tolist() == [1, 2, 3, 4] and np.isnan(boxes[1:]).all()
    assert problems == {
        1: "its box None is not four finite numbers",
        2: "its box [1, 2, 3] is not four finite numbers",
        3: "its box [1, nan, 2, 3] is not four finite numbers",
    }
    assert read_boxes([])[0].shape == (0, 4)


def test_objects_with_only_a_box_are_counted(dicts, caplog):
    del dicts[0]["annotations"][0]["segmentation"]
    with caplog.at_level(logging.INFO, logger="lsnet_d2"):
        check(dicts)
    assert "1 of 4 objects have neither segmentation nor extreme points" in caplog.text


def test_error_is_one_of_input_and_of_value():
    assert issubclass(AnnotationError, UserError) and issubclass(AnnotationError, ValueError)


def test_name_of_an_annotation(dicts):
    assert name_annotation(dicts[0], 1) == f"annotation 11 of image {dicts[0]['file_name']}"


@pytest.mark.slow
def test_hundred_thousand_images_take_seconds(tmp_path):
    (tmp_path / "image.jpg").touch()
    rng = np.random.default_rng(0)
    boxes = rng.uniform(1, 50, (100_000, 7, 4)).tolist()
    records = [
        {
            "file_name": str(tmp_path / "image.jpg"),
            "height": 100,
            "width": 100,
            "annotations": [
                {"id": 0, "bbox": b, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0} for b in row
            ],
        }
        for row in boxes
    ]
    start = time.process_time()
    check(records)
    assert time.process_time() - start < 15

import json

import pytest
from pycocotools import mask as mask_util

from lsnet_d2.errors import UserError
from lsnet_d2.ground_truth import (
    GROUND_TRUTHS,
    check_coco_file,
    coco_index,
    complete_annotations,
    count_keypoints,
    keypoint_ground_truth,
    mask_ground_truth,
)

OUTLINE = [[2.0, 3, 12, 3, 12, 9, 2, 9]]


def annotation(number, **values):
    return {"id": number, "image_id": 1, "category_id": 1, "bbox": [2, 3, 10, 6], **values}


def dataset(*annotations):
    return {
        "images": [{"id": 1, "height": 20, "width": 30}],
        "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "ball"}],
        "annotations": list(annotations),
    }


def test_missing_values():
    data = dataset(annotation(1), annotation(2, area=50, iscrowd=1))
    complete_annotations(data)
    first, second = data["annotations"]
    assert (first["area"], first["iscrowd"]) == (60, 0)
    assert (second["area"], second["iscrowd"]) == (50, 1)
    assert data["info"] == {}


def test_missing_keypoints():
    data = dataset(
        annotation(1, keypoints=[4, 5, 2, 0, 0, 0, 7, 7, 1]),
        annotation(2, category_id=2),
        annotation(3, keypoints=[4, 5, 2, 0, 0, 0, 7, 7, 1], num_keypoints=0),
        annotation(4, keypoints=[], num_keypoints=2),
    )
    complete_annotations(data)
    assert [a["num_keypoints"] for a in data["annotations"]] == [2, 0, 0, 0]
    assert [len(a["keypoints"]) for a in data["annotations"]] == [9, 9, 9, 9]
    assert count_keypoints(data["annotations"]) == 3
    assert count_keypoints([annotation(1)]) == 0


def test_copies_leave_the_data_set_alone():
    data = dataset(annotation(1, segmentation=OUTLINE, iscrowd=0, area=60, num_keypoints=0))
    for make in GROUND_TRUTHS.values():
        for copied in make(coco_index(data))["annotations"]:
            assert copied is not data["annotations"][0]
            copied["segmentation"] = None
    assert data["annotations"][0]["segmentation"] is OUTLINE


@pytest.mark.parametrize("segmentation", [None, [], [[]], [[1.0, 2, 3, 4]]])
def test_objects_without_a_mask_are_ignored(segmentation):
    data = dataset(annotation(1, segmentation=segmentation, iscrowd=0))
    (region,) = mask_ground_truth(coco_index(data))["annotations"]
    assert region["iscrowd"] == 1 and region["segmentation"] == OUTLINE
    (region,) = mask_ground_truth(coco_index(dataset(annotation(1))))["annotations"]
    assert region["iscrowd"] == 1


def test_masks_are_kept():
    rle = mask_util.frPyObjects(OUTLINE, 20, 30)[0]
    for segmentation in (OUTLINE, rle):
        data = dataset(annotation(1, segmentation=segmentation, iscrowd=0))
        (copied,) = mask_ground_truth(coco_index(data))["annotations"]
        assert copied["segmentation"] == segmentation and copied["iscrowd"] == 0


def test_other_ways_to_write_a_mask():
    """Pairs for vertices, and sizes that JSON has as floats."""
    pairs = [[[2, 3], [12, 3], [12, 9], [2, 9]]]
    rle = {**mask_util.frPyObjects(OUTLINE, 20, 30)[0], "size": [20.0, 30.0]}
    data = dataset(annotation(1, segmentation=pairs), annotation(2, segmentation=rle))
    first, second = mask_ground_truth(coco_index(data))["annotations"]
    assert first["segmentation"] == OUTLINE and not first.get("iscrowd")
    assert list(map(type, second["segmentation"]["size"])) == [int, int]


def assert_refused(folder, wrong, message):
    path = folder / "val.json"
    path.write_text(json.dumps(dataset(annotation(4), wrong)))
    expected = f"val.json: a problem:\n  annotation {wrong['id']} of image 1: {message}"
    with pytest.raises(UserError, match=expected):
        check_coco_file(str(path))


@pytest.mark.parametrize(
    "segmentation, message",
    [
        ({"size": [30, 20], "counts": "x"}, r"an RLE of .*\[30, 20\]"),
        ({"size": [20, 30], "counts": "1"}, "sum up to 1, not 600"),
        ([2.0, 3, 12, 3, 12, 9], "a flat list of numbers"),
        ("outline", "type str"),
        ([[2, 3, None, 3, 12, 9]], "no finite number"),
        ([[2, 3, "12", {}, 12, 9]], "no list of numbers"),
    ],
)
def test_unusable_masks(tmp_path, segmentation, message):
    assert_refused(tmp_path, annotation(8, segmentation=segmentation), f".*{message}")


@pytest.mark.parametrize(
    "box, message",
    [
        ([1, 2, 3], "is not four finite numbers"),
        (None, "is not four finite numbers"),
        ([1, 2, float("nan"), 4], "is not four finite numbers"),
        ([1, 2, -3, 4], "has a negative width or height"),
    ],
)
def test_unusable_boxes(tmp_path, box, message):
    assert_refused(tmp_path, annotation(8, bbox=box), f"its box .*{message}")


def test_boxes_that_are_never_found_pass(tmp_path):
    path = tmp_path / "val.json"
    boxes = ([50, 5, 4, 4], [3, 3, 0, 5])  # outside, and without a width
    path.write_text(json.dumps(dataset(*(annotation(8, bbox=box) for box in boxes))))
    check_coco_file(str(path))


@pytest.mark.parametrize("annotations", [None, {}, [1, 2]])
def test_annotations_that_are_none(tmp_path, annotations):
    path = tmp_path / "val.json"
    path.write_text(json.dumps({**dataset(), "annotations": annotations}))
    with pytest.raises(UserError, match="val.json: 'annotations' is not a list of objects"):
        check_coco_file(str(path))


def test_keypoints_of_classes_that_have_them():
    data = dataset(
        annotation(1, num_keypoints=2),
        annotation(2, num_keypoints=0),
        annotation(3, category_id=2, num_keypoints=0),
    )
    kept = keypoint_ground_truth(coco_index(data))
    # COCO's evaluation itself ignores the second
    assert [a["id"] for a in kept["annotations"]] == [1, 2]

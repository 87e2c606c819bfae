import numpy as np
import torch
from benchmark_project import inputs
from detectron2.structures import BoxMode


def test_objects_lie_in_the_image():
    first, second = inputs.model_inputs(2, 96, 128)
    for image in (first, second):
        instances = image["instances"]
        assert image["image"].shape == (3, 96, 128)
        assert len(instances) == inputs.OBJECTS
        boxes = instances.gt_boxes.tensor
        assert (boxes[:, 2:] - boxes[:, :2]).min() > 15
        assert boxes.min() >= 0
        assert (boxes.amax(dim=0)[2:] <= torch.tensor([128, 96])).all()
        # top, left, bottom and right lie on the sides of the box
        points = instances.gt_extreme_points
        sides = torch.stack([points[:, i, 1 - i % 2] for i in range(4)], dim=1)
        torch.testing.assert_close(sides, boxes[:, [1, 0, 3, 2]])
    assert (first["image"] != second["image"]).any()


def test_files(tmp_path):
    (record,) = inputs.dataset_dicts(tmp_path, 1, 48, 64)
    assert (record["height"], record["width"]) == (48, 64)
    for annotation in record["annotations"]:
        assert annotation["bbox_mode"] == BoxMode.XYXY_ABS
        contour = np.reshape(annotation["segmentation"], (-1, 2))
        assert annotation["bbox"] == [*contour.min(axis=0), *contour.max(axis=0)]


def test_crowds():
    boxes = inputs.crowd(1000, 800, 1333)
    assert boxes.shape == (1000, 4) and boxes.min() >= 0
    assert (boxes[:, 2] <= 1333).all() and (boxes[:, 3] <= 800).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_results_of_which_some_are_right():
    dataset, results = inputs.evaluated(3)
    assert len(dataset["images"]) == 3
    assert len(dataset["annotations"]) == 3 * inputs.OBJECTS
    assert len(results) == 6 * inputs.OBJECTS
    assert {r["category_id"] for r in results} == {a["category_id"] for a in dataset["annotations"]}

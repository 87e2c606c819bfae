import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.visualizer import ColorMode, Visualizer

from lsnet_d2.visualizer import PALETTE, LSNetVisualizer, side_by_side

GREY = 100
POINTS = [[100.0, 40], [40, 70], [90, 120], [160, 80]]
BOX = [40.0, 40, 160, 120]


def make_metadata():
    metadata = Metadata()
    metadata.thing_classes = ["disc", "star"]
    metadata.thing_colors = [(0, 255, 0), (0, 0, 255)]
    return metadata


def make_image(height=200, width=240):
    return np.full((height, width, 3), GREY, np.uint8)


def make_predictions(size=(200, 240), count=1):
    instances = Instances(size)
    instances.pred_boxes = Boxes(torch.tensor([BOX] * count).reshape(-1, 4))
    instances.scores = torch.full((count,), 0.87)
    instances.pred_classes = torch.ones(count, dtype=torch.int64)
    instances.pred_extreme_points = torch.tensor([POINTS] * count).reshape(-1, 4, 2)
    return instances


def changed(picture):
    return (np.abs(picture.astype(int) - GREY) > 20).any(axis=2)


def test_size_of_the_output():
    assert LSNetVisualizer(make_image(), scale=1.0).output.get_image().shape == (200, 240, 3)
    # small images are enlarged along their longer side to 640
    assert LSNetVisualizer(make_image(80, 160)).output.get_image().shape == (320, 640, 3)
    assert LSNetVisualizer(make_image(500, 800)).output.get_image().shape == (500, 800, 3)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_predictions_are_drawn_where_they_are(scale):
    visualizer = LSNetVisualizer(make_image(), make_metadata(), scale=scale)
    picture = visualizer.draw_instance_predictions(make_predictions()).get_image()
    mask = changed(picture)

    def at(x, y, radius=2):
        x, y = round(x * scale), round(y * scale)
        return mask[y - radius : y + radius + 1, x - radius : x + radius + 1].any()

    for x, y in POINTS:  # dots
        assert at(x, y)
    assert at((40 + 90) / 2, (70 + 120) / 2)  # the side from left to bottom
    assert at((90 + 160) / 2, (120 + 80) / 2)  # the side from bottom to right
    assert at(40, 110) and at(160, 50) and at(130, 40)  # the box
    assert not at(90, 85) and not at(150, 112)  # its inside
    assert not mask[:, round(200 * scale) :].any()
    assert not mask[round(150 * scale) :].any()


def test_colours():
    picture = LSNetVisualizer(make_image(), make_metadata(), 2.0).draw_instance_predictions(
        make_predictions()
    )
    first = np.array(PALETTE[0]) * 255
    # the line from left to bottom, at full strength somewhere on its way
    patch = picture.get_image()[170:210, 110:150].reshape(-1, 3).astype(float)
    assert np.abs(patch - first).max(axis=1).min() < 40
    visualizer = LSNetVisualizer(
        make_image(), make_metadata(), 2.0, instance_mode=ColorMode.SEGMENTATION
    )
    picture = visualizer.draw_instance_predictions(make_predictions()).get_image()
    patch = picture[170:210, 110:150].reshape(-1, 3).astype(float)
    assert np.abs(patch - (0, 0, 255)).max(axis=1).min() < 40


def test_pictures_are_the_same_in_every_run():
    pictures = [
        LSNetVisualizer(make_image(), make_metadata())
        .draw_instance_predictions(make_predictions(count=3))
        .get_image()
        for _ in range(2)
    ]
    assert np.array_equal(*pictures)


def test_labels():
    visualizer = LSNetVisualizer(make_image(), make_metadata())
    visualizer.draw_instance_predictions(make_predictions())
    assert [text.get_text() for text in visualizer.output.ax.texts] == ["star 87%"]
    without_names = LSNetVisualizer(make_image())
    without_names.draw_instance_predictions(make_predictions())
    assert [text.get_text() for text in without_names.output.ax.texts] == ["1 87%"]


def test_nothing_to_draw():
    visualizer = LSNetVisualizer(make_image(), make_metadata(), scale=1.0)
    picture = visualizer.draw_instance_predictions(make_predictions(count=0)).get_image()
    assert (picture == GREY).all()
    assert (visualizer.draw_dataset_dict({"annotations": []}).get_image() == GREY).all()


def test_ground_truth_equals_the_dict_it_came_from():
    instances = Instances((200, 240))
    instances.gt_boxes = Boxes(torch.tensor([BOX]))
    instances.gt_classes = torch.tensor([0])
    instances.gt_extreme_points = torch.tensor([POINTS])
    from_instances = LSNetVisualizer(make_image(), make_metadata()).draw_ground_truth(instances)
    annotation = {
        "bbox": [40, 40, 120, 80],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,
        "extreme_points": POINTS,
    }
    visualizer = LSNetVisualizer(make_image(), make_metadata())
    from_dict = visualizer.draw_dataset_dict({"annotations": [annotation]})
    assert changed(from_dict.get_image()).any()
    assert np.array_equal(from_instances.get_image(), from_dict.get_image())


def test_polygons_crowds_and_keypoints_of_a_dict():
    polygon = {
        "bbox": BOX,
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": 0,
        "segmentation": [[45.0, 45, 155, 45, 155, 115, 45, 115]],
        "keypoints": [200.0, 180, 2],
        "iscrowd": 1,
    }
    visualizer = LSNetVisualizer(make_image(), make_metadata(), scale=1.0)
    picture = visualizer.draw_dataset_dict({"annotations": [polygon]}).get_image()
    assert changed(picture)[70:100, 80:120].all()
    assert changed(picture)[180, 200]
    assert visualizer.output.ax.texts[0].get_text() == "disc|crowd"


def test_ignored_regions_are_dashed_grey():
    visualizer = LSNetVisualizer(make_image(), scale=1.0)
    picture = visualizer.draw_ignored(Boxes(torch.tensor([BOX]))).get_image().astype(int)
    edge = picture[40, 45:155]
    drawn = np.abs(edge - GREY).max(axis=1) > 20
    assert 0.3 < drawn.mean() < 0.95
    assert (edge.max(axis=1) - edge.min(axis=1)).max() < 5


def test_stock_visualizer_takes_our_instances():
    visualizer = Visualizer(make_image(), make_metadata())
    picture = visualizer.draw_instance_predictions(make_predictions()).get_image()
    assert picture.shape == (200, 240, 3)
    assert changed(picture).any()


def test_side_by_side():
    picture = side_by_side(make_image(), make_image())
    assert picture.shape == (200, 240 + 4 + 240, 3)
    assert (picture[:, 240:244] == 255).all()

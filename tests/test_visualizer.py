import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from detectron2.structures import (
    BitMasks,
    Boxes,
    BoxMode,
    Instances,
    Keypoints,
    PolygonMasks,
)
from detectron2.utils.visualizer import ColorMode, Visualizer
from pycocotools import mask as mask_util

from lsnet_d2.data.annotation_checks import AnnotationError
from lsnet_d2.errors import UserError
from lsnet_d2.visualizer import PALETTE, LSNetVisualizer, side_by_side

GREY = 100
POINTS = [[100.0, 40], [40, 70], [90, 120], [160, 80]]
BOX = [40.0, 40, 160, 120]
CONTOUR = [[100.0, 50], [50, 50], [50, 110], [150, 110], [150, 50]]  # from the top, a rectangle
JOINTS = [[100.0, 60], [60, 100], [140, 100]]  # head, left hand, right hand
BLUE, GREEN = (0, 0, 255), (0, 255, 0)


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


def make_skeleton():
    metadata = make_metadata()
    metadata.keypoint_names = ["head", "left_hand", "right_hand"]
    metadata.keypoint_connection_rules = [
        ("head", "left_hand", BLUE),
        ("head", "right_hand", GREEN),
    ]
    return metadata


def make_landmarks(prefix, *fields, size=(200, 240), factor=1.0, thirds=(2, 2, 2)):
    """An object with these fields, its coordinates times ``factor``."""
    known = {
        "boxes": lambda: Boxes(torch.tensor([BOX]) * factor),
        "extreme_points": lambda: torch.tensor([POINTS]) * factor,
        "contours": lambda: torch.tensor([CONTOUR]) * factor,
        "keypoints": lambda: torch.cat(
            [torch.tensor(JOINTS) * factor, torch.tensor(thirds)[:, None]], dim=1
        )[None],
        "masks": lambda: ring_mask(size)[None],
    }
    instances = Instances(size)
    for name in fields:
        instances.set(prefix + name, known[name]())
    if prefix == "gt_" and "keypoints" in fields:
        instances.gt_keypoints = Keypoints(instances.gt_keypoints)
    return instances


def ring_mask(size=(200, 240)):
    """(H, W) bool: a square of 80 pixels with a hole of 40."""
    mask = torch.zeros(size, dtype=torch.bool)
    mask[40:120, 60:140] = True
    mask[60:100, 80:120] = False
    return mask


def draw(instances, metadata=None, size=(200, 240), scale=1.0, **options):
    visualizer = LSNetVisualizer(make_image(*size), metadata, scale, **options)
    names = instances.get_fields()
    if any(name.startswith("gt_") for name in names):
        return visualizer.draw_ground_truth(instances).get_image()
    return visualizer.draw_instance_predictions(instances).get_image()


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


@pytest.mark.parametrize("prefix", ["gt_", "pred_"])
@pytest.mark.parametrize("size, factor, scale", [((160, 192), 0.8, 4.0), ((800, 960), 4.0, 1.0)])
@pytest.mark.parametrize("style", ["filled", "outlined"])
def test_contours(prefix, size, factor, scale, style):
    instances = make_landmarks(prefix, "contours", size=size, factor=factor)
    picture = draw(instances, size=size, scale=scale, contours=style).astype(float)
    mask = changed(picture)
    to_output = factor * scale

    def at(x, y):
        return picture[round(y * to_output), round(x * to_output)]

    color = np.array(PALETTE[0]) * 255
    # in the middles of sides; (125, 50) lies on the one that closes the contour
    for x, y in [(50, 80), (125, 50), (75, 50), (100, 110), (150, 80)]:
        patch = picture[
            round(y * to_output) - 4 : round(y * to_output) + 5,
            round(x * to_output) - 4 : round(x * to_output) + 5,
        ].reshape(-1, 3)
        assert np.abs(patch - color).max(axis=1).min() < 40
    inside = 0.65 * GREY + 0.35 * color if style == "filled" else [GREY] * 3
    assert at(100, 80) == pytest.approx(inside, abs=3)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    assert [rows[0], rows[-1]] == pytest.approx([50 * to_output, 110 * to_output], abs=4)
    assert [columns[0], columns[-1]] == pytest.approx([50 * to_output, 150 * to_output], abs=4)


def test_vertices_are_dots_where_there_is_room():
    def dots(num_points, scale):
        angles = np.linspace(0, 2 * np.pi, num_points, endpoint=False)
        circle = 100 + 60 * np.stack([np.sin(angles), np.cos(angles)], axis=1)
        visualizer = LSNetVisualizer(make_image(), scale=scale)
        visualizer.overlay_contours([circle], ["red"])
        return sum(len(line.get_xdata()) for line in visualizer.output.ax.lines)

    assert dots(18, 1.0) == 18
    assert dots(72, 1.0) == 0
    assert dots(72, 4.0) == 72
    assert dots(180, 4.0) == 0


def test_an_unknown_style():
    with pytest.raises(ValueError, match="'dashed'"):
        LSNetVisualizer(make_image(), contours="dashed")


@pytest.mark.parametrize("prefix", ["gt_", "pred_"])
def test_a_contour_stands_in_for_the_mask(prefix):
    contour = draw(make_landmarks(prefix, "contours"))
    assert np.array_equal(contour, draw(make_landmarks(prefix, "contours", "masks")))
    assert not np.array_equal(contour, draw(make_landmarks(prefix, "masks")))


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_masks_keep_their_holes(scale):
    picture = draw(make_landmarks("pred_", "masks"), scale=scale)
    mask = changed(picture)
    inner, outer = round(4 * scale), round(2 * scale)

    def block(x0, y0, x1, y1, margin):
        return mask[
            round(y0 * scale) + margin : round(y1 * scale) - margin,
            round(x0 * scale) + margin : round(x1 * scale) - margin,
        ]

    assert block(60, 40, 140, 60, 0).mean() > 0.98  # a corner pixel may be rounded off
    assert not block(80, 60, 120, 100, inner).any()
    assert mask.sum() == block(60, 40, 140, 120, -outer).sum()


@pytest.mark.parametrize("style", ["filled", "outlined"])
def test_forms_of_masks(style):
    square = torch.zeros(1, 200, 240, dtype=torch.bool)
    square[0, 50:110, 50:150] = True
    polygon = np.array([50.0, 50, 150, 50, 150, 110, 50, 110])
    part = np.array([50.0, 110, 150, 110, 150, 50])  # in it, of the other sense of rotation
    pictures = []
    for masks in (square, BitMasks(square), PolygonMasks([[polygon, part]])):
        instances = Instances((200, 240))
        instances.gt_masks = masks
        pictures.append(changed(draw(instances, scale=4.0, contours=style)))
    assert pictures[0].sum() > 300 and np.array_equal(pictures[0], pictures[1])
    if style == "filled":
        assert (pictures[0] != pictures[2]).mean() < 0.002
    empty = Instances((200, 240))
    empty.pred_masks = torch.zeros(2, 200, 240, dtype=torch.bool)
    assert not changed(draw(empty)).any()


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_annotated_keypoints(scale):
    instances = make_landmarks("gt_", "keypoints", thirds=(2, 1, 0))
    picture = draw(instances, make_metadata(), scale=scale).astype(int)
    mask = changed(picture)

    def around(joint, radius):
        x, y = (round(value * scale) for value in joint)
        return mask[y - radius : y + radius + 1, x - radius : x + radius + 1]

    head, left, right = JOINTS
    assert around(head, 1).sum() >= 5
    assert around(left, round(3 * scale)).any() and not mask[round(100 * scale), round(60 * scale)]
    assert not around(right, round(6 * scale)).any()
    # no names of keypoints, no bones
    assert not around(((100 + 60) / 2, (60 + 100) / 2), round(4 * scale)).any()


def test_predicted_keypoints_need_a_score():
    instances = make_landmarks("pred_", "keypoints", thirds=(0.9, 0.4, 0.01))
    for threshold, expected in ((0.05, [True, True, False]), (0.5, [True, False, False])):
        mask = changed(draw(instances, make_skeleton(), keypoint_threshold=threshold))
        assert [bool(mask[int(y), int(x)]) for x, y in JOINTS] == expected


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_bones_have_the_colours_of_the_rules(scale):
    picture = draw(make_landmarks("gt_", "keypoints"), make_skeleton(), scale=scale)
    for x, color in (((100 + 60) / 2, BLUE), ((100 + 140) / 2, GREEN)):
        middle = picture[round(80 * scale) - 3 : round(80 * scale) + 4, round(x * scale)]
        assert np.abs(middle.astype(int) - color).max(axis=1).min() < 60
    # a bone ends at a joint that is not labelled
    thirds = (2, 0, 2)
    picture = draw(make_landmarks("gt_", "keypoints", thirds=thirds), make_skeleton())
    assert not changed(picture)[80:105, 55:85].any()


def test_joints_fit_the_picture():
    def covered(size, factor, scale):
        instances = make_landmarks("gt_", "keypoints", size=size, factor=factor)
        return changed(draw(instances, size=size, scale=scale)).sum() / len(JOINTS)

    # Detectron2's radius of 3 pixels of the input would cover 28 and, enlarged, 452
    small, enlarged = covered((100, 160), 0.6, 1.0), covered((100, 160), 0.6, 4.0)
    assert 4 < small < 16
    assert 16 < enlarged < 60
    assert enlarged == pytest.approx(covered((400, 640), 2.4, 1.0), rel=0.2)
    # an object a tenth as large has dots half as wide
    assert covered((400, 640), 0.24, 1.0) < enlarged / 2


@pytest.mark.parametrize(
    "missing, neck, spine",
    [
        (None, True, True),
        ("nose", False, True),
        ("left_hip", True, False),
        ("left_shoulder", False, False),
    ],
)
def test_people_have_a_trunk(missing, neck, spine):
    names = ["nose", "left_shoulder", "right_shoulder", "left_hip", "right_hip"]
    points = [[100.0, 20], [80, 60], [120, 60], [85, 140], [115, 140]]
    keypoints = [[*p, 2 * (n != missing)] for n, p in zip(names, points, strict=True)]
    visualizer = LSNetVisualizer(make_image(), Metadata(keypoint_names=names), scale=1.0)
    mask = changed(visualizer.overlay_keypoints([np.array(keypoints)], ["red"]).get_image())
    assert (mask[40, 98:103].any(), mask[100, 98:103].any()) == (neck, spine)


def test_another_number_of_keypoints_than_names():
    metadata = Metadata(name="stick_figures", keypoint_names=["head"])
    with pytest.raises(UserError, match="stick_figures name 1 keypoints, but an object has 3"):
        draw(make_landmarks("pred_", "keypoints"), metadata)


@pytest.mark.parametrize("prefix", ["gt_", "pred_"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_everything_in_one_drawing(prefix, scale):
    parts = ("boxes", "contours", "extreme_points", "keypoints")
    joint = make_landmarks(prefix, *parts)
    mask = changed(draw(joint, make_skeleton(), scale=scale, contours="outlined"))
    for part in ("boxes", "contours", "keypoints"):
        alone = make_landmarks(prefix, part)
        shown = changed(draw(alone, make_skeleton(), scale=scale, contours="outlined"))
        # extreme points lie on the others, in white and the same colour
        assert (shown & ~mask).sum() <= 0.01 * shown.sum() + 4
    for x, y in POINTS:
        assert mask[round(y * scale), round(x * scale)]


def test_extreme_points_on_an_outline_are_not_joined():
    # between the bottom and the right, inside the contour
    side = np.s_[85:105, 110:130]
    assert changed(draw(make_landmarks("gt_", "extreme_points")))[side].any()
    both = make_landmarks("gt_", "extreme_points", "contours")
    assert not changed(draw(both, contours="outlined"))[side].any()


def test_annotations_need_not_be_alike():
    bare = {"bbox": BOX, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    rle = mask_util.encode(np.asfortranarray(ring_mask().numpy().astype(np.uint8)))
    skeleton = [value for joint in JOINTS for value in (*joint, 2)]
    annotations = [bare, {**bare, "segmentation": rle}, {**bare, "keypoints": skeleton}]
    visualizer = LSNetVisualizer(make_image(), make_skeleton(), scale=1.0)
    mask = changed(visualizer.draw_dataset_dict({"annotations": annotations}).get_image())
    assert mask[50, 70] and not mask[80, 110]  # ring and hole
    assert all(mask[int(y), int(x)] for x, y in JOINTS)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("segmentation", mask_util.encode(np.zeros((10, 20), np.uint8, order="F")), r"\[10, 20\]"),
        ("segmentation", CONTOUR[0], "a flat list"),
        ("segmentation", 7, "has no len"),
        ("extreme_points", [1, 2, 3], "four or five points"),
        ("keypoints", [1, 2, 3, 4], "cannot reshape"),
    ],
)
def test_malformed_annotations(key, value, message):
    bare = {"bbox": BOX, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    record = {"file_name": "a.png", "annotations": [bare, {**bare, key: value}]}
    with pytest.raises(AnnotationError, match=f"number 1 of image a.png: its '{key}': .*{message}"):
        LSNetVisualizer(make_image()).draw_dataset_dict(record)


@pytest.mark.parametrize("kind", [list, np.array])
def test_extreme_points_may_have_a_centre(kind):
    def picture(points):
        bare = {"bbox": BOX, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
        record = {"annotations": [{**bare, "extreme_points": kind(points)}]}
        return LSNetVisualizer(make_image()).draw_dataset_dict(record).get_image()

    flat = [value for point in POINTS for value in point]
    np.testing.assert_array_equal(picture([*flat, 100.0, 80.0]), picture(POINTS))


def test_identities_choose_colours():
    def edges(identities):
        instances = make_predictions(count=2)
        instances.pred_boxes.tensor[1] += 30
        visualizer = LSNetVisualizer(make_image(), make_metadata())
        visualizer.draw_instance_predictions(instances, identities=identities)
        return [patch.get_edgecolor()[:3] for patch in visualizer.output.ax.patches]

    assert edges(None) == edges([0, 1]) == PALETTE[:2]
    assert edges([3, 0]) == [PALETTE[3], PALETTE[0]]
    assert edges([12, 1]) == [PALETTE[0], PALETTE[1]]


def test_stock_visualizer_takes_our_instances():
    instances = make_predictions()
    instances.pred_contours = torch.tensor([CONTOUR])
    instances.pred_masks = ring_mask()[None]
    instances.pred_keypoints = torch.tensor([[[x, y, 0.9] for x, y in JOINTS]])
    for metadata in (make_metadata(), make_skeleton()):
        visualizer = Visualizer(make_image(), metadata)
        picture = visualizer.draw_instance_predictions(instances).get_image()
        assert picture.shape == (200, 240, 3)
        mask = changed(picture)
        assert mask[50, 70]
        assert all(mask[int(y), int(x)] for x, y in JOINTS)


def test_side_by_side():
    picture = side_by_side(make_image(), make_image())
    assert picture.shape == (200, 240 + 4 + 240, 3)
    assert (picture[:, 240:244] == 255).all()


def test_extreme_points_as_gen_coco_lsvr_writes_them():
    """Ten numbers, of which the last two are the centre."""
    annotation = {
        "bbox": [20, 10, 40, 40],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,
        "extreme_points": [30, 10, 20, 25, 45, 50, 60, 35, 40, 30],
    }
    image = np.zeros((60, 100, 3), dtype=np.uint8)
    record = {"annotations": [annotation], "file_name": "a.jpg"}
    drawn = LSNetVisualizer(image).draw_dataset_dict(record).get_image()
    flat = {**annotation, "extreme_points": annotation["extreme_points"][:8]}
    expected = LSNetVisualizer(image).draw_dataset_dict({**record, "annotations": [flat]})
    assert drawn.any() and np.array_equal(drawn, expected.get_image())
    annotation["extreme_points"] = [1, 2, 3]
    with pytest.raises(AnnotationError, match="annotation number 0 of image a.jpg"):
        LSNetVisualizer(image).draw_dataset_dict(record)

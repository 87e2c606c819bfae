import numpy as np
import pytest
from detectron2.data import transforms as T

from lsnet_d2.data.viewport import Viewport

HEIGHT, WIDTH = 60, 100
SIDES = np.array([[30.0, 10], [20, 25], [45, 50], [60, 35]])  # top, left, bottom, right
BOX = np.array([[20.0, 10, 60, 50]])


def viewport(*transforms, size=(HEIGHT, WIDTH)):
    return Viewport(
        T.TransformList(list(transforms)), original_size=(HEIGHT, WIDTH), image_size=size
    )


def test_flips_rename_the_sides():
    flipped = viewport(T.HFlipTransform(WIDTH))
    assert flipped.sides(SIDES).tolist() == [[70, 10], [40, 35], [55, 50], [80, 25]]
    upside_down = viewport(T.VFlipTransform(HEIGHT))
    assert upside_down.sides(SIDES).tolist() == [[45, 10], [20, 35], [30, 50], [60, 25]]


@pytest.mark.parametrize("angle", [90, 180, 270])
def test_right_angles_rename_the_sides(angle):
    rotation = T.RotationTransform(HEIGHT, WIDTH, angle, expand=True)
    size = (WIDTH, HEIGHT) if angle % 180 else (HEIGHT, WIDTH)
    view = viewport(rotation, size=size)
    assert view.axis_aligned
    top, left, bottom, right = view.sides(SIDES)
    (box,), _ = view.boxes(BOX)
    np.testing.assert_allclose([left[0], top[1], right[0], bottom[1]], box, atol=1e-4)


def test_names_do_not_hang_on_the_points():
    # top and left are one point, as are bottom and right
    corners = np.array([[20.0, 10], [20, 10], [60, 50], [60, 50]])
    flipped = viewport(T.HFlipTransform(WIDTH)).sides(corners)
    assert flipped.tolist() == [[80, 10], [40, 50], [40, 50], [80, 10]]


def test_other_rotations_are_not_axis_aligned():
    view = viewport(T.RotationTransform(HEIGHT, WIDTH, 20, expand=False))
    assert not view.axis_aligned
    top, left, bottom, right = sides = view.sides(SIDES)
    assert top[1] == sides[:, 1].min() and bottom[1] == sides[:, 1].max()
    assert left[0] == sides[:, 0].min() and right[0] == sides[:, 0].max()


def test_crop_cuts_boxes_and_polygons():
    view = viewport(T.CropTransform(40, 0, 30, HEIGHT), size=(HEIGHT, 30))
    boxes, cut = view.boxes(np.array([[20, 10, 60, 50], [45, 5, 50, 9], [0, 0, 30, 30]]))
    assert boxes[:2].tolist() == [[0, 10, 20, 50], [5, 5, 10, 9]]
    assert cut.tolist() == [True, False, True]
    assert boxes[2, 0] == boxes[2, 2] == 0
    polygon = np.array([[20.0, 10], [60, 10], [60, 50], [20, 50]])
    (part,) = view.polygons([polygon])
    assert part.min(axis=0).tolist() == [0, 10] and part.max(axis=0).tolist() == [20, 50]


def test_what_a_crop_cut_off_stays_off_when_padding_follows():
    view = viewport(
        T.CropTransform(40, 0, 30, HEIGHT), T.PadTransform(0, 0, 70, 0), size=(HEIGHT, WIDTH)
    )
    boxes, cut = view.boxes(np.array([[60.0, 10, 90, 50]]))
    assert boxes.tolist() == [[20, 10, 30, 50]] and cut.all()
    (part,) = view.polygons([np.array([[60.0, 10], [90, 10], [90, 50], [60, 50]])])
    assert part[:, 0].max() == 30


def test_reaching_over_the_original_border_is_not_being_cut():
    boxes, cut = viewport(T.HFlipTransform(WIDTH)).boxes(np.array([[-3.0, 5, 50, 65]]))
    assert boxes.tolist() == [[50, 5, 100, 60]] and not cut.any()


def test_nothing_and_no_boxes():
    boxes, cut = viewport(T.NoOpTransform()).boxes(np.array([]))
    assert boxes.shape == (0, 4) and cut.shape == (0,)


def test_changes_no_argument():
    view = viewport(T.HFlipTransform(WIDTH), T.CropTransform(10, 10, 50, 30), size=(30, 50))
    sides, boxes = SIDES.copy(), BOX.copy()
    view.sides(sides), view.boxes(boxes), view.polygons([sides]), view.points(sides)
    np.testing.assert_array_equal(sides, SIDES)
    np.testing.assert_array_equal(boxes, BOX)


@pytest.mark.parametrize(
    ("transforms", "mirrored"),
    [
        ([], False),
        ([T.HFlipTransform(WIDTH)], True),
        ([T.VFlipTransform(HEIGHT)], True),
        ([T.HFlipTransform(WIDTH), T.VFlipTransform(HEIGHT)], False),
        ([T.RotationTransform(HEIGHT, WIDTH, 20, expand=False)], False),
        ([T.RotationTransform(HEIGHT, WIDTH, 200, expand=False), T.HFlipTransform(WIDTH)], True),
    ],
)
def test_mirrored(transforms, mirrored):
    assert viewport(*transforms).mirrored is mirrored

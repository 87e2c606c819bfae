import json

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from parity import DIRECTORY, Recorded
from pycocotools import mask as mask_util

from lsnet_d2.data.polygons import (
    bounding_box,
    check_form,
    check_rle,
    clip_polygons,
    decode_rle,
    is_usable,
    level_set,
    mask_holes,
    mask_to_polygons,
    polygons_to_rle,
    segmentation_to_outlines,
    segmentation_to_polygons,
    signed_area,
)

SQUARE = np.array([[0, 0], [10, 0], [10, 10], [0, 10]], dtype=float)


def area(polygon):
    x, y = polygon.T
    return abs((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) / 2


@st.composite
def stars(draw):
    """Outlines that do not cross themselves: concave, around a centre."""
    radii = draw(arrays(float, draw(st.integers(3, 16)), elements=st.floats(2, 60)))
    angles = np.linspace(0, 2 * np.pi, len(radii), endpoint=False)
    centre = np.array([draw(st.floats(-20, 120)), draw(st.floats(-20, 120))])
    return centre + np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def test_inside_stays_and_outside_vanishes():
    assert clip_polygons([SQUARE], 10, 10)[0] is SQUARE
    assert clip_polygons([SQUARE + 20], 10, 10) == []
    assert clip_polygons([SQUARE + [10, 0]], 10, 10) == []  # touches


def test_corner_of_a_square():
    (part,) = clip_polygons([SQUARE - [4, 7]], 10, 10)
    assert bounding_box([part]).tolist() == [0, 0, 6, 3]
    assert area(part) == 18


def test_a_cut_through_the_middle_leaves_two_parts():
    # a U lying on its side, with its bend beyond the border
    bend = np.array([[10, 0], [-5, 0], [-5, 30], [10, 30], [10, 20], [-2, 20], [-2, 10], [10, 10]])
    parts = clip_polygons([bend.astype(float)], 40, 40)
    boxes = sorted(bounding_box([part]).tolist() for part in parts)
    assert boxes == [[0, 0, 10, 10], [0, 20, 10, 30]]


def test_legs_that_hang_together_stay_one_part():
    legs = np.array([[0, 0], [30, 0], [30, 50], [20, 50], [20, 10], [10, 10], [10, 50], [0, 50]])
    (part,) = clip_polygons([legs.astype(float)], 40, 40)
    assert area(part) == 30 * 10 + 2 * 10 * 30


@given(stars(), st.integers(40, 100), st.integers(40, 100))
def test_clipped_area_is_that_of_the_pixels_inside(polygon, width, height):
    scale, offset = 8, 100 * 8
    size = 300 * scale

    def paint(polygons):
        canvas = np.zeros((size, size), np.uint8)
        for outline in polygons:
            pixels = np.round(outline * scale).astype(np.int32) + offset
            canvas ^= cv2.fillPoly(np.zeros_like(canvas), [pixels], 1)
        return canvas[offset : offset + height * scale, offset : offset + width * scale]

    parts = clip_polygons([polygon], width, height)
    for part in parts:
        x0, y0, x1, y1 = bounding_box([part])
        assert x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height
    # fillPoly paints the outline too: differences along it, of a painted pixel's width
    painted, expected = paint(parts), paint([polygon])
    different = cv2.erode((painted != expected).astype(np.uint8), np.ones((4, 4), np.uint8))
    assert different.sum() == 0
    assert sum(map(area, parts)) <= area(polygon) + 1e-6


@given(stars(), st.integers(0, 15))
def test_clipping_does_not_depend_on_the_first_vertex(polygon, turn):
    parts = clip_polygons([polygon], 80, 60)
    turned = clip_polygons([np.roll(polygon, turn, axis=0)], 80, 60)
    assert len(parts) == len(turned)
    assert sum(map(area, turned)) == pytest.approx(sum(map(area, parts)), abs=1e-6)


def test_an_outline_that_crosses_itself_stays_inside():
    bow = np.array([[-5, 0], [20, 30], [20, 0], [-5, 30]], dtype=float)
    parts = clip_polygons([bow], 15, 25)
    assert parts
    x0, y0, x1, y1 = bounding_box(parts)
    assert x0 >= 0 and y0 >= 0 and x1 <= 15 and y1 <= 25


@pytest.mark.parametrize(
    "polygon",
    [
        [[0, 0], [1, 1]],
        [[0, 0], [1, 1], [2, 2], [3, 3]],
        [[5, 5], [5, 5], [5, 5]],
        [[0, 0], [np.nan, 1], [2, 0]],
        [[0, 0], [np.inf, 1], [2, 0]],
    ],
)
def test_unusable(polygon):
    assert not is_usable(np.array(polygon, dtype=float))


def test_usable_though_its_signed_area_is_zero():
    assert is_usable(np.array([[0, 0], [10, 10], [10, 0], [0, 10]], dtype=float))


def test_segmentation_keeps_usable_parts():
    segmentation = [[0, 0, 4, 0, 4, 4], [1, 1, 2, 2], [1, 1, 2, 2, 3, 3], [], [7] * 6]
    (part,) = segmentation_to_polygons(segmentation, 10, 10)
    assert part.tolist() == [[0, 0], [4, 0], [4, 4]]
    assert segmentation_to_polygons(None, 10, 10) == []
    assert segmentation_to_polygons([], 10, 10) == []


def test_three_forms_of_a_rectangle():
    mask = np.zeros((20, 30), np.uint8)
    mask[4:9, 5:25] = 1
    compressed = mask_util.encode(np.asfortranarray(mask))
    column_wise = mask.T.reshape(-1)
    changes = np.flatnonzero(np.diff(column_wise)) + 1
    counts = np.diff([0, *changes, column_wise.size]).tolist()
    uncompressed = {"size": [20, 30], "counts": counts}
    text = {**compressed, "counts": compressed["counts"].decode()}
    polygon = [[5, 4, 25, 4, 25, 9, 5, 9]]
    for segmentation in (compressed, text, uncompressed, polygon):
        parts = segmentation_to_polygons(segmentation, 20, 30)
        assert bounding_box(parts).tolist() == [5, 4, 25, 9]
        assert sum(map(area, parts)) == 100


@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": [30, 20], "counts": [600]},
        {"size": [20, 30], "counts": [5, 5]},
        {"size": [20, 30], "counts": [-1, 601]},
        {"size": [20, 30]},
        {"size": [20, 30], "counts": [600.0]},
        {"size": [20, 30], "counts": ["600"]},
        {"counts": [600]},
        {"size": 20, "counts": [600]},
        7,
        "0 0 4 0 4 4",
        [{"x": 1}],
    ],
)
def test_malformed_segmentations(segmentation):
    with pytest.raises(ValueError, match="RLE|type"):
        segmentation_to_polygons(segmentation, 20, 30)


@pytest.mark.parametrize(
    "segmentation, message",
    [
        ([0, 0, 4, 0, 4, 4], "a flat list of numbers"),
        ([0.5, 0, 4, 0, 4, 4], "a flat list of numbers"),
        ([[0, 0, 4, 0, 4, 4], [0, 0, 1, 1, 2, 2, 3]], "a polygon of 7 numbers"),
        ([np.arange(9.0)], "a polygon of 9 numbers"),
        ([[7]], "a polygon of 1 numbers"),
        ([["a", "b"]], "could not convert"),
        ([[{}, {}]], "no list of numbers"),
        ([[10**400, 0, 4, 0, 4, 4]], "int too large"),
    ],
)
def test_lists_that_are_no_polygons(segmentation, message):
    with pytest.raises(ValueError, match=message):
        segmentation_to_polygons(segmentation, 20, 30)


def test_form_where_the_size_of_the_image_is_not_known():
    check_form({"size": [20, 30], "counts": [600]}, None)
    check_form([np.zeros((3, 2))], None)
    with pytest.raises(ValueError, match="type str"):
        check_form("outline", None)


@given(
    arrays(np.uint8, st.tuples(st.integers(1, 70), st.integers(1, 70)), elements=st.integers(0, 1))
)
def test_masks_survive_their_code(mask):
    rle = mask_util.encode(np.asfortranarray(mask))
    text = {**rle, "counts": rle["counts"].decode()}
    for form in (rle, text):
        np.testing.assert_array_equal(decode_rle(form, *mask.shape), mask)


def test_code_of_long_runs():
    mask = np.zeros((3000, 2000), np.uint8)
    mask[:, 999] = 1  # runs of 2997000, 3000, 3000000
    mask[0, 3] = 1
    rle = mask_util.encode(np.asfortranarray(mask))
    np.testing.assert_array_equal(decode_rle(rle, 3000, 2000), mask)


@pytest.mark.parametrize(
    "counts", ["", b"", "1", "zzzz{{~~oooooooo", "PPPPPPPPPPPP0", "0P", "0M", "\u00e9", "hb"]
)
def test_damaged_codes(counts):
    with pytest.raises(ValueError, match="RLE"):
        decode_rle({"size": [20, 30], "counts": counts}, 20, 30)


@given(st.data())
def test_a_code_that_was_cut_off_is_damaged(data):
    mask = data.draw(arrays(np.uint8, (20, 30), elements=st.integers(0, 1)))
    rle = mask_util.encode(np.asfortranarray(mask))
    rle["counts"] = rle["counts"][: data.draw(st.integers(0, len(rle["counts"]) - 1))]
    with pytest.raises(ValueError, match="RLE"):
        check_rle(rle, 20, 30)


def test_outline_of_a_mask_goes_round_its_pixels():
    mask = np.zeros((8, 9), np.uint8)
    assert mask_to_polygons(mask) == []
    mask[3, 4] = 1
    (pixel,) = mask_to_polygons(mask)
    assert bounding_box([pixel]).tolist() == [4, 3, 5, 4]
    assert area(pixel) == 1
    mask[6:8, 7:9] = 1
    assert len(mask_to_polygons(mask)) == 2
    assert bounding_box(mask_to_polygons(mask)).tolist() == [4, 3, 9, 8]


def test_holes_of_a_mask():
    mask = np.zeros((40, 50), np.uint8)
    mask[5:35, 10:40] = 1
    assert mask_holes(mask) == []
    mask[10:20, 15:25] = 0
    mask[25:33, 30:38] = 0
    mask[28, 33] = 1  # an island
    mask[6, 11] = 0  # too small to count
    mask[5:9, 38] = 0  # open to the outside
    holes = sorted(mask_holes(mask), key=lambda hole: hole[0, 0])
    assert [bounding_box([hole]).tolist() for hole in holes] == [[15, 10, 25, 20], [30, 25, 38, 33]]
    assert [abs(area(hole)) for hole in holes] == [100, 64]
    assert mask_holes(np.ones((4, 4))) == mask_holes(np.zeros((4, 4))) == []


def test_holes_of_a_segmentation():
    mask = np.ones((20, 30), np.uint8)
    mask[5:15, 5:25] = 0
    rle = mask_util.encode(np.asfortranarray(mask))
    (part,), (hole,) = segmentation_to_outlines(rle, 20, 30)
    assert bounding_box([part]).tolist() == [0, 0, 30, 20]
    assert bounding_box([hole]).tolist() == [5, 5, 25, 15]
    # of COCO's polygons one inside another adds nothing and takes nothing away
    parts, holes = segmentation_to_outlines([[0, 0, 9, 0, 9, 9], [1, 1, 2, 1, 2, 2]], 20, 30)
    assert len(parts) == 2 and holes == []
    assert segmentation_to_outlines(None, 20, 30) == ([], [])


def test_rle_as_recorded(parity):
    recorded = Recorded("comp_polygon_rle.npz")
    with open(DIRECTORY / "comp_polygon_rle.json") as file:
        expected = json.load(file)
    polygons = recorded["polygons"].numpy().reshape(-1, 36, 2)
    rles = polygons_to_rle(polygons, *expected["size"])
    parity.equal("RLEs of contours", [rle["counts"] for rle in rles], expected["counts"])
    assert all(rle["size"] == expected["size"] for rle in rles)
    parity.equal("areas of contours", mask_util.area(rles), recorded["area"])


def test_rle_is_cut_off_at_the_border():
    (rle,) = polygons_to_rle((SQUARE - [4, 7])[None], 20, 30)
    mask = mask_util.decode(rle)
    assert mask.shape == (20, 30) and mask.sum() == 18 and mask[:3, :6].all()


def test_rle_of_bad_polygons():
    assert polygons_to_rle(np.zeros((0, 36, 2)), 20, 30) == []
    with pytest.raises(ValueError, match="a polygon of 2 vertices"):
        polygons_to_rle(SQUARE[None, :2], 20, 30)
    with pytest.raises(ValueError, match="not finite"):
        polygons_to_rle(SQUARE[None] * np.nan, 20, 30)


class TestLevelSet:
    def test_of_a_disc_with_a_hole(self):
        y, x = np.mgrid[:41, :51]
        distance = np.hypot(x - 25.3, y - 20.6)
        (outer,), (hole,) = level_set(5 - np.abs(distance - 10))
        for outline, radius in ((outer, 15), (hole, 5)):
            lengths = np.hypot(*(outline - [25.3, 20.6]).T)
            assert np.abs(lengths - radius).max() < 0.1
            assert not np.array_equal(outline[0], outline[-1])
            assert abs(signed_area(outline)) == pytest.approx(np.pi * radius**2, rel=0.02)

    def test_of_two_parts(self):
        values = -np.ones((9, 12))
        values[2:5, 1:4] = values[6:8, 7:11] = 1
        parts, holes = level_set(values)
        # half a cell further than the cells above 0
        assert sorted(bounding_box([part]).tolist() for part in parts) == [
            [0.5, 1.5, 3.5, 4.5],
            [6.5, 5.5, 10.5, 7.5],
        ]
        assert holes == []

    def test_of_nothing_and_of_all(self):
        assert level_set(-np.ones((4, 5))) == ([], [])
        (all_of_it,), holes = level_set(np.ones((4, 5)))
        assert bounding_box([all_of_it]).tolist() == [-0.5, -0.5, 4.5, 3.5]
        assert holes == []

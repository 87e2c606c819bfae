import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from parity import Recorded

from lsnet_d2.data.extreme_points import as_extreme_points, extreme_points, side_midpoints

# Dyadic numbers: sums and mirrored values are exact.
COORDINATES = st.integers(-2000, 2000).map(lambda value: value / 8)


@st.composite
def objects(draw, max_parts=3):
    count = draw(st.integers(1, max_parts))
    return [
        draw(arrays(float, (draw(st.integers(3, 12)), 2), elements=COORDINATES))
        for _ in range(count)
    ]


def recorded_objects():
    recorded = Recorded("comp_extreme_points.npz")
    ends = recorded["part_len"].cumsum(0).tolist()
    parts = np.split(recorded["points"].numpy(), ends[:-1])
    lasts = recorded["num_parts"].cumsum(0).tolist()
    return [parts[first:last] for first, last in zip([0, *lasts], lasts, strict=False)], recorded


def test_equals_released_code_on_polygons(parity):
    polygons, recorded = recorded_objects()
    ours = np.stack([extreme_points(parts, integer=True) for parts in polygons])
    assert len(ours) == 220
    parity.equal("extreme points of polygons", ours.reshape(-1, 8), recorded["extremes"])


def test_without_rounding_stays_within_a_pixel_of_it():
    polygons, recorded = recorded_objects()
    ours = np.stack([extreme_points(parts) for parts in polygons]).reshape(-1, 8)
    up = ours - recorded["extremes"].numpy()
    assert up.min() >= 0 and up.max() < 1 and up.max() > 0.5


def test_equals_released_code_on_pixels_of_masks(parity):
    recorded = Recorded("comp_extreme_points.npz")
    ours = [
        extreme_points([np.argwhere(mask)[:, ::-1]], integer=True)
        for mask in recorded["masks"].numpy()
    ]
    expected = recorded["mask_extremes"]
    parity.equal("extreme points of masks", np.reshape(ours, (-1, 8)), expected)


@pytest.mark.parametrize("joined", [True, False])
def test_diamond(joined):
    diamond = np.array([[50, 0], [0, 40], [50, 100], [100, 60]])
    expected = [[50, 0], [0, 40], [50, 100], [100, 60]]
    np.testing.assert_array_equal(extreme_points([diamond], joined=joined), expected)


def test_middle_of_a_flat_side_that_the_first_vertex_splits():
    square = np.array([[0, 0], [10, 0], [10, 10], [0, 10]], dtype=float)
    middles = [[5, 0], [0, 5], [5, 10], [10, 5]]
    for turn in range(4):
        turned = np.roll(square, turn, axis=0)
        np.testing.assert_array_equal(extreme_points([turned], joined=False), middles)
    # the released code takes the repeated last vertex for the right extreme, and stops there
    turned = np.roll(square, 1, axis=0)
    assert extreme_points([turned]).tolist() == [[5, 0], [0, 5], [5, 10], [10, 10]]


def test_tolerance_counts_two_hundredths_of_the_extent():
    # extent 99 + 1: within 2 pixels of the top
    roof = np.array([[10, 0], [30, 2], [60, 2.01], [60, 99], [10, 99]])
    assert extreme_points([roof])[0].tolist() == [20, 0]
    assert extreme_points([roof], tolerance=0.03)[0].tolist() == [35, 0]


def test_parts_apart_have_the_point_on_one_of_them():
    left = np.array([[0, 0], [10, 0], [10, 20], [0, 20]], dtype=float)
    right = left + [50, 0]
    assert extreme_points([left, right], joined=False)[0].tolist() == [5, 0]
    assert extreme_points([left, right], joined=False)[2].tolist() == [5, 20]
    # joined: the last vertex of all comes first, and its neighbours are those of other sides
    assert extreme_points([left, right])[2].tolist() == [50, 20]
    higher = right - [0, 4]
    assert extreme_points([left, higher], joined=False)[0].tolist() == [55, -4]


@given(objects(), st.booleans())
def test_points_lie_on_the_sides_of_the_bounding_box(parts, joined):
    points = np.concatenate(parts)
    (x0, y0), (x1, y1) = points.min(axis=0), points.max(axis=0)
    top, left, bottom, right = extreme_points(parts, joined=joined)
    assert (top[1], left[0], bottom[1], right[0]) == (y0, x0, y1, x1)
    assert x0 <= min(top[0], bottom[0]) and max(top[0], bottom[0]) <= x1
    assert y0 <= min(left[1], right[1]) and max(left[1], right[1]) <= y1


@given(objects(), st.booleans())
def test_flip_exchanges_left_and_right(parts, joined):
    plain = extreme_points(parts, joined=joined)
    flipped = extreme_points([np.array([640, 0]) + part * [-1, 1] for part in parts], joined=joined)
    np.testing.assert_array_equal(flipped, ([640, 0] + plain * [-1, 1])[[0, 3, 2, 1]])
    upside_down = extreme_points([part * [1, -1] for part in parts], joined=joined)
    np.testing.assert_array_equal(upside_down, (plain * [1, -1])[[2, 1, 0, 3]])


@given(objects(), st.tuples(COORDINATES, COORDINATES), st.booleans())
def test_moves_with_the_object(parts, shift, joined):
    moved = extreme_points([part + shift for part in parts], joined=joined)
    np.testing.assert_array_equal(moved, extreme_points(parts, joined=joined) + shift)


@given(objects(max_parts=1), st.integers(0, 11), st.booleans())
def test_closed_outline_has_no_start_and_no_direction(parts, turn, backwards):
    points = parts[0]
    for axis in (0, 1):  # extremes in one place each
        for extreme in (points[:, axis].min(), points[:, axis].max()):
            assume((points[:, axis] == extreme).sum() == 1)
    turned = np.roll(points, turn, axis=0)
    turned = turned[::-1] if backwards else turned
    np.testing.assert_array_equal(
        extreme_points([turned], joined=False), extreme_points([points], joined=False)
    )


def test_does_not_change_its_input():
    part = np.array([[1.5, 2], [3, 4], [0, 9]])
    before = part.copy()
    extreme_points([part], integer=True)
    np.testing.assert_array_equal(part, before)


@pytest.mark.parametrize("parts", [[], [np.zeros((0, 2))]])
def test_no_points(parts):
    with pytest.raises(ValueError, match="no points"):
        extreme_points(parts)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(value):
    with pytest.raises(ValueError, match="not finite"):
        extreme_points([np.array([[0, 0], [1, value], [2, 2]])])


def test_side_midpoints():
    boxes = np.array([[0, 10, 20, 50], [1, 1, 2, 2]])
    points = side_midpoints(boxes)
    assert points.shape == (2, 4, 2)
    assert points[0].tolist() == [[10, 10], [0, 30], [10, 50], [20, 30]]
    np.testing.assert_array_equal(side_midpoints(boxes[0]), points[0])


def test_as_extreme_points_reads_the_forms_of_the_key():
    points = [[5, 0], [0, 3], [5, 9], [8, 3]]
    flat = [value for point in points for value in point]
    for value in (points, flat, [*flat, 4, 4.5], [*points, [4, 4.5]]):
        np.testing.assert_array_equal(as_extreme_points(value), points)


@pytest.mark.parametrize(
    "value", [[1, 2, 3], [[1, 2], [3]], "points", [np.nan] * 8, 7, [None] * 8, [10**400] * 8]
)
def test_as_extreme_points_refuses_others(value):
    with pytest.raises(ValueError, match="four or five points"):
        as_extreme_points(value)

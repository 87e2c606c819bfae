import cv2
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lsnet_d2.data.joining import closest_vertices, join_parts
from lsnet_d2.data.polygons import bounding_box, mask_to_polygons, signed_area

SEEDS = st.integers(0, 2**32 - 1)


def square(x, y, side):
    return np.array([[x, y], [x, y + side], [x + side, y + side], [x + side, y]], dtype=float)


def test_parts_become_one_outline_with_their_area():
    parts = [square(0, 0, 10), square(14, 2, 4)[::-1]]
    joined = join_parts(parts)
    assert len(joined) == 4 + 4 + 2  # both ends of the bridge twice
    assert signed_area(joined) == -(10 * 10 + 4 * 4)
    assert (bounding_box([joined]) == bounding_box(parts)).all()


def test_parts_inside_others_are_left_out():
    assert len(join_parts([square(0, 0, 10), square(3, 3, 4)])) == 4


def test_bridges_between_long_outlines_join_the_closest_vertices():
    mask = np.zeros((220, 480), np.uint8)
    cv2.circle(mask, (110, 110), 100, 1, -1)
    cv2.ellipse(mask, (345, 115), (120, 90), 0, 0, 360, 1, -1)
    first, second = mask_to_polygons(mask)
    assert min(len(first), len(second)) > 500
    squared = ((first[:, None] - second) ** 2).sum(axis=2)
    here, there = closest_vertices(first, second)
    assert (here, there) == divmod(squared.argmin(), len(second))


@given(SEEDS, st.integers(1, 300), st.integers(1, 300))
def test_closest_vertices_of_any_outlines(seed, count, other_count):
    """On a coarse grid many pairs are equally close, and the first of them counts."""
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, 60, (count, 2)) / 2, rng.integers(40, 100, (other_count, 2)) / 2
    squared = ((first[:, None] - second) ** 2).sum(axis=2)
    assert closest_vertices(first, second) == divmod(squared.argmin(), other_count)

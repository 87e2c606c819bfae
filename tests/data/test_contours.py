import os
import subprocess
import sys
import tracemalloc

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from parity import Recorded
from pycocotools import mask as mask_util

from lsnet_d2.data.contours import (
    CONTOUR_METHODS,
    reference_contours,
    resample_contour,
    spread_over_edges,
)
from lsnet_d2.data.polygons import bounding_box, mask_to_polygons, polygons_to_rle

# Dyadic numbers: sums and mirrored values are exact.
COORDINATES = st.integers(-2000, 2000).map(lambda value: value / 8)
NUM_POINTS = st.integers(8, 128)
SEEDS = st.integers(0, 2**32 - 1)
SQUARE = np.array([[0, 0], [0, 100], [100, 100], [100, 0]], dtype=float)


@st.composite
def objects(draw, max_parts=3):
    """Any points: outlines may cross themselves, repeat vertices, or lie on a line."""
    count = draw(st.integers(1, max_parts))
    return [
        draw(arrays(float, (draw(st.integers(1, 12)), 2), elements=COORDINATES))
        for _ in range(count)
    ]


def blob(seed):
    """A convex polygon of 5 to 59 vertices on an ellipse of any direction."""
    rng = np.random.default_rng(seed)
    count = rng.integers(5, 60)
    angles = (np.arange(count) + rng.uniform(0, 0.9, count)) * 2 * np.pi / count
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1) * rng.uniform(10, 200, 2)
    cosine, sine = np.cos(seed), np.sin(seed)
    return points @ [[cosine, sine], [-sine, cosine]] + rng.uniform(0, 600, 2)


def star(seed):
    """A polygon that does not cross itself, with deep bays."""
    rng = np.random.default_rng(seed)
    count = rng.integers(4, 60)
    angles = (np.arange(count) + rng.uniform(0, 0.9, count)) * 2 * np.pi / count
    radii = rng.uniform(20, 100, count)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def signed_area(outline):
    (x0, y0), (x1, y1) = (outline - outline[0]).T, (np.roll(outline, -1, axis=0) - outline[0]).T
    return (x0 * y1 - x1 * y0).sum() / 2


def distances(points, outline):
    """How far points are from an outline."""
    edges = np.roll(outline, -1, axis=0) - outline
    away = points[:, None] - outline
    share = (away * edges).sum(axis=2) / np.maximum((edges**2).sum(axis=1), 1e-300)
    return np.sqrt(((away - share.clip(0, 1)[..., None] * edges) ** 2).sum(axis=2)).min(axis=1)


def top_middle(points):
    x0, y0, x1, _ = bounding_box([points])
    return np.array([(x0 + x1) / 2, y0])


def recorded_objects():
    recorded = Recorded("comp_polygon_sampling.npz")
    ends = recorded["part_len"].cumsum(0).tolist()
    parts = np.split(recorded["points"].numpy(), ends[:-1])
    lasts = recorded["num_parts"].cumsum(0).tolist()
    return [parts[first:last] for first, last in zip([0, *lasts], lasts, strict=False)], recorded


def iou(outline, polygons):
    """Of regions drawn at 4 times the size."""
    canvases = []
    for outlines in ([outline], polygons):
        canvas = np.zeros((600, 800), np.uint8)
        for part in outlines:
            cv2.fillPoly(canvas, [np.round(part * 4).astype(int)], 1)
        canvases.append(canvas > 0)
    return (canvases[0] & canvases[1]).sum() / (canvases[0] | canvases[1]).sum()


def test_spreads_points_as_released_code(parity):
    polygons, recorded = recorded_objects()
    assert not recorded["edge_length_tie"].any()
    ours = np.stack([spread_over_edges(parts[0], 360) for parts in polygons])
    expected = recorded["uniform360_first_part"]
    parity.absolute("outlines of 360 points", ours, expected, within=1e-9, unit="px")
    assert max(len(parts[0]) for parts in polygons) > 360  # the rule for many vertices too


def test_contours_of_all_parts_equal_released_code(parity):
    polygons, recorded = recorded_objects()
    expected = recorded["unified"].numpy().reshape(-1, 36, 2)
    owner = recorded["unified_inst"].numpy()
    compared = 0
    for index, parts in enumerate(polygons):
        if not recorded["orientation_ambiguous"][index]:
            ours = reference_contours(parts, box=recorded["gt_boxes"][index].numpy())
            theirs = expected[owner == index]
            parity.absolute("contours of each part", ours, theirs, within=1e-9, unit="px")
            compared += len(ours)
    assert compared == 138


def test_reference_takes_the_largest_part(parity):
    polygons, recorded = recorded_objects()
    expected = recorded["unified"].numpy().reshape(-1, 36, 2)
    owner = recorded["unified_inst"].numpy()
    several = [i for i in np.unique(owner).tolist() if (owner == i).sum() > 1]
    assert len(several) == 20
    for index in several:
        candidates = expected[owner == index]
        areas = [abs(signed_area(candidate)) for candidate in candidates]
        ours = resample_contour(polygons[index], method="reference")
        theirs = candidates[np.argmax(areas)]
        parity.absolute("contours of the largest part", ours, theirs, within=1e-9, unit="px")


@pytest.mark.parametrize("num_points", [8, 35, 100, 128])
def test_reference_with_other_numbers_of_points(num_points):
    contour = resample_contour([SQUARE], num_points, method="reference")
    dense = spread_over_edges(SQUARE, 360)
    assert contour.shape == (num_points, 2)
    assert len(np.unique(contour, axis=0)) == num_points
    assert (contour[:, None] == dense).all(axis=2).any(axis=1).all()
    steps = np.abs(contour - np.roll(contour, -1, axis=0)).sum(axis=1)
    assert steps.max() - steps.min() < 400 / 360 + 1e-9


def test_reference_falls_back_to_the_box():
    line = np.array([[0, 0], [10, 0.5], [20, 0]])
    contour = resample_contour([line], method="reference", box=(0, 0, 36, 72))
    assert contour.min(axis=0).tolist() == [0, 0] and contour.max(axis=0).tolist() == [36, 72]
    np.testing.assert_allclose(contour[:2], [[18, 0], [12, 0]])
    own = resample_contour([line], method="reference")
    assert own.max(axis=0).tolist() == pytest.approx([20, 0.5])


def test_square():
    contour = resample_contour([SQUARE], 8)
    expected = [[50, 0], [0, 0], [0, 50], [0, 100], [50, 100], [100, 100], [100, 50], [100, 0]]
    np.testing.assert_allclose(contour, expected)


def test_vertices_on_a_line_change_nothing():
    dense = spread_over_edges(SQUARE, 80)
    for start in (0, 7):
        contour = resample_contour([np.roll(dense, start, axis=0)])
        np.testing.assert_allclose(contour, resample_contour([SQUARE]), atol=1e-9)


@pytest.mark.parametrize("count", [200, 211])
@pytest.mark.parametrize("turn", [0, 0.003, 0.01, 0.02])
def test_circle_is_sampled_evenly(count, turn):
    """Points on vertices are off even places by half an edge, and by what the sides' extreme
    vertices are off, however the circle is turned."""
    angles = np.arange(count) * 2 * np.pi / count + turn
    circle = 100 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    contour = resample_contour([circle])
    closed = np.concatenate([contour, contour[:1]])
    turns = np.diff(np.unwrap(np.arctan2(closed[:, 1], closed[:, 0])))
    assert (turns < 0).all()
    np.testing.assert_allclose(turns, -np.pi / 18, rtol=0.4)


def test_corners_become_points():
    # an arrow of 7 corners: even spacing misses most
    arrow = np.array([[0, 40], [53, 40], [53, 11], [97, 50], [53, 89], [53, 60], [0, 60.0]])
    contour = resample_contour([arrow], 18)
    assert (contour == arrow[:, None]).all(axis=2).any(axis=1).all()
    assert iou(contour, [arrow]) > 0.999
    assert iou(resample_contour([arrow], 18, method="reference"), [arrow]) < 0.96


def test_parts_are_joined_by_bridges_without_width():
    left, right = SQUARE / 2 + [10, 20], SQUARE / 2 + [110, 40]
    contour = resample_contour([left, right])
    assert iou(contour, [left, right]) > 0.98
    np.testing.assert_array_equal(bounding_box([contour]), [10, 20, 160, 90])
    alone = resample_contour([left, right], method="reference")
    assert iou(alone, [left, right]) < 0.51
    shuffled = resample_contour([right[::-1], left])
    assert iou(shuffled, [left, right]) > 0.98


def test_a_bridge_under_the_start_leads_to_the_left_first():
    left = np.array([[0, 0], [0, 50], [40, 50], [50, 0.0]])
    right = [200, 0] + left * [-1, 1]
    for parts in ([left, right], [right, left], [right[::-1], np.roll(left, 1, axis=0)]):
        contour = resample_contour(parts)
        np.testing.assert_allclose(contour[0], [100, 0])
        assert (contour[1:18, 0] < 100).all() and (contour[19:, 0] > 100).all()


def test_parts_inside_others_and_specks_are_left_out():
    alone = resample_contour([SQUARE])
    hole, speck = SQUARE / 4 + 30, SQUARE / 50 + [40, 2]
    np.testing.assert_array_equal(resample_contour([SQUARE, hole]), alone)
    bay = np.array([[0, 0], [0, 100], [100, 100], [100, 0], [60, 90], [40, 90.0]])
    in_bay = speck + [9, 0]
    assert distances(in_bay, bay).min() > 1
    np.testing.assert_array_equal(resample_contour([bay, in_bay]), resample_contour([bay]))
    # one that reaches beyond the box counts, so that the box is the object's
    outside = speck + [70, 0]
    joined = resample_contour([SQUARE, outside])
    np.testing.assert_array_equal(bounding_box([joined]), [0, 0, 112, 100])


def test_a_hole_is_left_open():
    hole = SQUARE / 2 + 25
    for ring in (hole, hole[::-1], np.roll(hole, 1, axis=0)):
        contour = resample_contour([SQUARE], 60, holes=[ring])
        np.testing.assert_allclose(contour[0], [50, 0])
        assert signed_area(contour) == pytest.approx(-(100**2 - 50**2), rel=1e-3)
    inner = (contour > 24).all(axis=1) & (contour < 76).all(axis=1)
    # first all around the outside, then, after the bridge, the hole
    assert not inner[:36].any() and 18 <= inner.sum() <= 21
    np.testing.assert_array_equal(
        resample_contour([SQUARE], method="reference", holes=[hole]),
        resample_contour([SQUARE], method="reference"),
    )


@given(SEEDS, st.floats(0.3, 0.8), st.integers(36, 128))
def test_contour_of_a_ring_encloses_its_mask(seed, share, num_points):
    rng = np.random.default_rng(seed)
    angles = rng.uniform(0, 6) + np.arange(48) * np.pi / 24
    disk = np.stack([np.cos(angles), np.sin(angles)], axis=1) * rng.uniform(40, 100, 2)
    centre = rng.uniform(-0.5, 0.5) * (1 - share) * disk[0]
    contour = resample_contour([disk], num_points, holes=[disk * share + centre])
    np.testing.assert_array_equal(bounding_box([contour]), bounding_box([disk]))
    area, hole = -abs(signed_area(disk)), -abs(signed_area(disk)) * share**2
    assert signed_area(contour) == pytest.approx(area - hole, rel=0.1)


def test_holes_in_several_parts():
    parts = [SQUARE, SQUARE + [120, 0]]
    holes = [SQUARE / 2 + 25, SQUARE / 2 + [145, 25]]
    contour = resample_contour(parts, 128, holes=holes)
    np.testing.assert_array_equal(bounding_box([contour]), [0, 0, 220, 100])
    mask = np.zeros((100, 220), np.uint8)
    for part, value in [*((part, 1) for part in parts), *((hole, 0) for hole in holes)]:
        cv2.fillPoly(mask, [part.astype(np.int32)], value)
    (rle,) = polygons_to_rle(contour[None], 100, 220)
    found = mask_util.decode(rle)
    assert (found & mask).sum() / (found | mask).sum() > 0.95


def test_outline_of_a_mask():
    mask = np.zeros((150, 200), np.uint8)
    cv2.ellipse(mask, (90, 70), (70, 40), 30, 0, 360, 1, -1)
    cv2.circle(mask, (130, 50), 40, 1, -1)
    mask[5, ::20] = 1
    polygons = mask_to_polygons(mask)
    assert len(polygons) > 5 and max(map(len, polygons)) > 256
    contour = resample_contour(polygons)
    np.testing.assert_array_equal(bounding_box([contour]), bounding_box(polygons))
    assert iou(contour, polygons) > 0.97


def test_masks_of_many_large_parts_need_no_table_of_all_vertices():
    """Two outlines of 12000 vertices: a table of their distances would take 1 GB."""
    angles = np.arange(12000) * np.pi / 6000
    disk = 1000 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    tracemalloc.start()
    try:
        contour = resample_contour([disk, disk + [2100, 0]])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_allclose(bounding_box([contour]), [-1000, -1000, 3100, 1000], atol=1e-9)
    assert peak < 30e6


@given(objects(), NUM_POINTS)
def test_any_input_gives_a_contour_with_the_bounding_box_of_the_object(parts, num_points):
    contour = resample_contour(parts, num_points)
    assert contour.shape == (num_points, 2) and contour.dtype == np.float64
    np.testing.assert_array_equal(bounding_box([contour]), bounding_box(parts))


@given(objects(), NUM_POINTS)
def test_any_input_gives_a_reference_contour(parts, num_points):
    contour = resample_contour(parts, num_points, method="reference")
    assert contour.shape == (num_points, 2) and np.isfinite(contour).all()


@given(SEEDS, NUM_POINTS, st.booleans(), st.sampled_from(CONTOUR_METHODS))
def test_runs_counter_clockwise_on_the_screen(seed, num_points, backwards, method):
    outline = star(seed)[:: -1 if backwards else 1]
    assert signed_area(resample_contour([outline], num_points, method=method)) < 0


def test_runs_from_top_to_left_to_bottom_to_right():
    diamond = np.array([[50, 0], [100, 50], [50, 100], [0, 50.0]])
    for method in CONTOUR_METHODS:
        contour = resample_contour([diamond], 8, method=method)
        np.testing.assert_allclose(contour[::2], [[50, 0], [0, 50], [50, 100], [100, 50]])


@given(objects(max_parts=1), NUM_POINTS)
def test_starts_near_the_middle_of_the_upper_side(parts, num_points):
    """At the outline's nearest point, or at most a quarter of an even spacing from it."""
    contour = resample_contour(parts, num_points)
    top = top_middle(parts[0])
    nearest = distances(top[None], parts[0])[0]
    length = np.hypot(*(parts[0] - np.roll(parts[0], 1, axis=0)).T).sum()
    away = np.hypot(*(contour[0] - top))
    assert nearest - 1e-9 <= away <= nearest + length / num_points / 4 + 1e-9


@given(SEEDS, NUM_POINTS)
def test_starts_with_the_point_nearest_to_the_middle_of_the_upper_side(seed, num_points):
    outline = blob(seed)
    contour = resample_contour([outline], num_points)
    away = np.hypot(*(contour - top_middle(outline)).T)
    assert away[0] == pytest.approx(away.min(), abs=1e-9)


def test_start_makes_way_for_the_vertex_beside_it():
    roof = np.array([[0, 30], [0, 100], [100, 100], [100, 30], [54, 0.0]])
    contour = resample_contour([roof], 20)  # a spacing is 19
    assert contour[0].tolist() == [54, 0]
    steps = np.hypot(*(contour - np.roll(contour, 1, axis=0)).T)
    assert steps.min() > 10
    # farther away it is a point beside the start
    roof[4, 0] = 60
    contour = resample_contour([roof], 20)
    assert contour[0, 0] < 60 and contour[-1].tolist() == [60, 0]
    # a box needs all its corners, the start is one
    spike = np.array([[50, 0], [49.9, 5], [0, 5], [0, 100], [100, 100], [100, 5], [50.1, 5.0]])
    assert resample_contour([spike], 8)[0].tolist() == [50, 0]


@given(objects(max_parts=1), NUM_POINTS)
def test_points_lie_on_the_outline(parts, num_points):
    assert distances(resample_contour(parts, num_points), parts[0]).max() < 1e-9


@given(SEEDS, NUM_POINTS, st.tuples(COORDINATES, COORDINATES), st.floats(0.1, 10))
def test_moves_and_grows_with_the_object(seed, num_points, shift, scale):
    parts = [star(seed), star(seed + 1) / 2 + [200, 30]]
    moved = resample_contour([part * scale + shift for part in parts], num_points)
    expected = resample_contour(parts, num_points) * scale + shift
    np.testing.assert_allclose(moved, expected, atol=1e-8)


@given(SEEDS, NUM_POINTS, st.sampled_from([blob, star]))
def test_mirrored_object_has_the_mirrored_contour(seed, num_points, shape):
    """The first point stays the first, the others run the other way."""
    outline = shape(seed)
    mirrored = resample_contour([outline * [-1, 1]], num_points) * [-1, 1]
    mirrored = np.roll(mirrored[::-1], 1, axis=0)
    np.testing.assert_allclose(mirrored, resample_contour([outline], num_points), atol=1e-8)


@given(SEEDS, NUM_POINTS, st.integers(0, 60))
def test_first_vertex_does_not_matter(seed, num_points, turn):
    outline = star(seed)
    turned = resample_contour([np.roll(outline, turn, axis=0)], num_points)
    np.testing.assert_allclose(turned, resample_contour([outline], num_points), atol=1e-8)


def evenly_spaced(outline, first, count):
    """Points at even distances along an outline, counter-clockwise from a point on it."""
    outline = outline[::-1] if signed_area(outline) > 0 else outline
    gaps = [distances(first[None], outline[[i - 1, i]])[0] for i in range(len(outline))]
    closed = np.concatenate([[first], np.roll(outline, -np.argmin(gaps), axis=0), [first]])
    steps = np.sqrt((np.diff(closed, axis=0) ** 2).sum(axis=1))
    arc = np.concatenate([[0], steps.cumsum()])
    along = np.arange(count) * arc[-1] / count
    points = np.stack([np.interp(along, arc, closed[:, axis]) for axis in (0, 1)], axis=1)
    return points, arc[-1] / count


def off_even(outline, num_points):
    """How many even spacings each point is from where even spacing puts it."""
    contour = resample_contour([outline], num_points)
    even, spacing = evenly_spaced(outline, contour[0], num_points)
    return np.hypot(*(contour - even).T) / spacing


def moves(outline, seed, num_points):
    """How many even spacings each point moves when the vertices move by up to 0.2% of the size."""
    noise = np.random.default_rng(seed).uniform(-0.002, 0.002, outline.shape)
    contour = resample_contour([outline], num_points)
    changed = resample_contour([outline + noise * np.ptp(outline, axis=0).max()], num_points)
    length = np.hypot(*(outline - np.roll(outline, 1, axis=0)).T).sum()
    return np.hypot(*(changed - contour).T) / (length / num_points)


@given(SEEDS, NUM_POINTS)
def test_points_of_a_blob_are_near_even_spacing(seed, num_points):
    """On convex shapes no point is two spacings away, and on average less than one."""
    away = off_even(blob(seed), num_points)
    assert away.max() < 2 and away.mean() < 1


@given(SEEDS, NUM_POINTS)
def test_small_changes_of_a_blob_move_its_points_little(seed, num_points):
    """At worst, key vertices change so that points go to the next places: none moves by three
    spacings, nor all together by more than one on average."""
    away = moves(blob(seed), seed, num_points)
    assert away.max() < 3 and away.mean() <= 1


@pytest.mark.parametrize("num_points", [18, 36, 72])
def test_most_blobs_have_even_and_steady_points(num_points):
    """What the worst cases above hide: 9 of 10 blobs, and 98 of 100."""
    even = [off_even(blob(seed), num_points).mean() for seed in range(300)]
    assert (np.percentile(even, [90, 98]) < [0.28, 0.4]).all()
    steady = [moves(blob(seed), seed, num_points).mean() for seed in range(300)]
    assert (np.percentile(steady, [90, 98]) < [0.3, 0.45]).all()


@pytest.mark.parametrize("method", CONTOUR_METHODS)
def test_does_not_change_its_input(method):
    parts = [star(1), star(2) + 300]
    before = [part.copy() for part in parts]
    resample_contour(parts, method=method)
    for part, old in zip(parts, before, strict=True):
        np.testing.assert_array_equal(part, old)


def test_a_line_is_run_along_and_back():
    contour = resample_contour([np.array([[0, 0], [30, 40.0]])], 8)
    assert contour[0].tolist() == pytest.approx([5.4, 7.2])  # nearest to (15, 0)
    np.testing.assert_array_equal(bounding_box([contour]), [0, 0, 30, 40])
    np.testing.assert_allclose(contour[:, 1] * 3, contour[:, 0] * 4, atol=1e-12)


@pytest.mark.parametrize("method", CONTOUR_METHODS)
def test_a_point_is_repeated(method):
    for count in (1, 5):
        contour = resample_contour([np.full((count, 2), 7.5)], 12, method=method)
        np.testing.assert_allclose(contour, np.full((12, 2), 7.5))


@pytest.mark.parametrize("method", CONTOUR_METHODS)
def test_bad_input(method):
    for parts in ([], [np.zeros((0, 2))]):
        with pytest.raises(ValueError, match="no points"):
            resample_contour(parts, method=method)
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match="not finite"):
            resample_contour([SQUARE, np.array([[0, 0], [value, 0], [1, 1]])], method=method)
    for num_points in (7, 129):
        with pytest.raises(ValueError, match=f"8 to 128 points, not {num_points}"):
            resample_contour([SQUARE], num_points, method=method)


def test_bad_options():
    with pytest.raises(ValueError, match="one of adaptive, reference, not 'even'"):
        resample_contour([SQUARE], method="even")
    with pytest.raises(ValueError, match="box of a contour is not finite"):
        resample_contour([SQUARE], method="reference", box=(0, 0, np.nan, 1))


def test_needs_neither_torch_nor_detectron2():
    code = (
        "import importlib, sys, types; "
        "package = types.ModuleType('geometry'); package.__path__ = [sys.argv[1]]; "
        "sys.modules['geometry'] = package; "
        "importlib.import_module('geometry.contours').resample_contour; "
        "assert not {'torch', 'detectron2'} & set(sys.modules)"
    )
    folder = os.path.dirname(sys.modules["lsnet_d2.data.contours"].__file__)
    subprocess.run([sys.executable, "-c", code, folder], check=True, timeout=60)

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import tiny_model

from lsnet_d2.modeling import areas
from lsnet_d2.modeling.areas import (
    Lattice,
    SoftArea,
    area_iou,
    cells_inside,
    distance_to_outline,
    to_segment,
)
from lsnet_d2.modeling.branches import ContourBranch
from lsnet_d2.modeling.landmarks import LandmarkTargets, span_boxes

SIZE = 13, 17
SEEDS = st.integers(0, 10_000)


def area_loss(polygons, true):
    return SoftArea(true).loss(polygons)


def random_polygons(seed, objects=4, vertices=9, size=SIZE):
    """In cells. Some reach over the border of the map, and most cross themselves."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([float(size[1]), float(size[0])])
    return (torch.rand(objects, vertices, 2, generator=generator) * 1.4 - 0.2) * scale


def square(x=0.0, y=0.0, width=40.0, height=20.0):
    corners = torch.tensor([[0.0, 0.0], [0.0, height], [width, height], [width, 0.0]])
    return (corners + torch.tensor([x, y]))[None]


def with_edges_halved(polygons, times=3):
    for _ in range(times):
        middles = (polygons + polygons.roll(-1, 1)) / 2
        polygons = torch.stack([polygons, middles], dim=2).flatten(1, 2)
    return polygons


@given(SEEDS)
def test_inside_as_opencv_has_it(seed):
    polygons = random_polygons(seed)
    found = cells_inside(polygons, SIZE)
    for polygon, cells in zip(polygons, found, strict=True):
        fine = 64  # OpenCV fills whole pixels: away from the outline both agree
        points = np.round(polygon.numpy() * fine).astype(np.int32)
        shape = SIZE[0] * fine, SIZE[1] * fine
        mask, line = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
        cv2.fillPoly(mask, [points], 1)
        cv2.polylines(line, [points], True, 1, thickness=5)
        sure = torch.from_numpy(line[::fine, ::fine] == 0)
        assert torch.equal(cells[sure], torch.from_numpy(mask[::fine, ::fine] == 1)[sure])


def test_squares_of_cells():
    outer = square(2.0, 1.0, 3.0, 2.0)
    assert cells_inside(outer, (5, 7)).sum() == 2 * 3  # half open: rows 1, 2 and columns 2 to 4
    hole = square(3.0, 1.0, 1.0, 1.0)
    bridged = torch.cat([outer, outer[:, :1], hole, hole[:, :1]], dim=1)
    assert cells_inside(bridged, (5, 7)).sum() == 2 * 3 - 1
    assert cells_inside(torch.zeros(0, 36, 2), SIZE).shape == (0, *SIZE)


@pytest.mark.parametrize("bad", [(torch.nan, 3.0), (3.0, torch.nan), (torch.inf, -torch.inf)])
def test_what_is_not_finite(bad):
    """It must show in the loss, whose check names the image, and not as an index out of range."""
    true = with_edges_halved(square())
    broken = true.clone()
    broken[0, 5] = torch.tensor(bad)
    assert not area_loss(broken, true).isfinite().any()
    assert 0 <= area_iou(true, broken) <= 1
    assert cells_inside(broken, SIZE).shape == (1, *SIZE)


@pytest.mark.parametrize("x, y", [(0, 0), (10, 0), (0, 5), (20, 10), (50, 0), (-10, -5)])
def test_iou_of_squares(x, y):
    shared = max(40 - abs(x), 0) * max(20 - abs(y), 0)
    iou = area_iou(square(), with_edges_halved(square(x, y)))
    assert iou.item() == pytest.approx(shared / (1600 - shared), abs=0.02)


@given(SEEDS)
def test_iou_of_large_masks(seed):
    a, b = (random_polygons(s, vertices=6, size=(40, 40)) for s in (seed, seed + 1))
    found = area_iou(a, b)
    torch.testing.assert_close(found, area_iou(b, a))
    for one, other, iou in zip(a, b, found, strict=True):
        masks = np.zeros((2, 640, 640), np.uint8)
        for mask, polygon in zip(masks, (one, other), strict=True):
            cv2.fillPoly(mask, [np.round((polygon.numpy() + 10) * 10).astype(np.int32)], 1)
        shared, either = (masks[0] & masks[1]).sum(), (masks[0] | masks[1]).sum()
        # spikes thinner than a place are among them
        assert iou.item() == pytest.approx(shared / either, abs=0.05)


@given(SEEDS)
def test_distance_is_that_to_the_nearest_edge(seed):
    polygons = random_polygons(seed)
    places = random_polygons(seed + 1, vertices=30)
    dense = with_edges_halved(polygons, times=8)
    brute = torch.cdist(places, dense).amin(dim=2)
    torch.testing.assert_close(distance_to_outline(polygons, places), brute, rtol=0, atol=0.05)


def test_few_at_once_find_the_same(monkeypatch):
    polygons, places = random_polygons(0, objects=7), random_polygons(1, objects=7, vertices=30)
    together = distance_to_outline(polygons, places)
    monkeypatch.setattr(areas, "_AT_ONCE_ON_CPU", 2 * 9 * 30)
    assert torch.equal(distance_to_outline(polygons, places), together)


def test_gradient_of_the_distance():
    polygons = random_polygons(0).double().requires_grad_()
    places = random_polygons(1, vertices=30).double()
    assert torch.autograd.gradcheck(lambda p: distance_to_outline(p, places), polygons)


def test_coverage_is_soft_at_the_edge():
    lattice = Lattice.over(square(), 20, 2.0)  # cells of 4 by 2 pixels
    coverage, covered = lattice.coverage(square()), lattice.covered(square())
    assert torch.equal(coverage > 0.5, covered) and covered.sum() == 10 * 10
    row = coverage.view(20, 20)[10]
    softness = 0.5 * 8**0.5
    for place, pixels in ((4, -2.0), (5, 2.0), (3, -6.0)):
        expected = 1 / (1 + np.exp(-pixels / softness))
        assert row[place].item() == pytest.approx(expected, abs=1e-5)


def test_what_a_shift_costs():
    true = with_edges_halved(square())
    shifts = torch.arange(5.0)
    moved = (true + torch.stack([shifts, 0 * shifts], 1)[:, None]).requires_grad_()
    loss = area_loss(moved, true.expand_as(moved))
    exact = 1 - (40 - shifts) / (40 + shifts)
    torch.testing.assert_close(loss, exact, rtol=0, atol=0.02)
    assert loss[0].abs() < 1e-6
    (gradient,) = torch.autograd.grad(loss.sum(), moved)
    assert (gradient[1:].sum(1)[:, 0] > 0.01).all()
    assert gradient[1:].sum(1)[:, 1].abs().max() < 1e-5


def test_what_is_far_outside_the_true_box_does_not_count():
    true = with_edges_halved(square())
    larger = ((true - true.mean(1)) * 3 + true.mean(1)).requires_grad_()
    loss = area_loss(larger, true)
    assert loss.item() == pytest.approx(1 - 1 / 1.25**2, abs=0.03)
    (gradient,) = torch.autograd.grad(loss.sum(), larger)
    assert gradient.abs().max() < 1e-4


def test_a_place_on_the_outline_has_a_gradient():
    polygon = square().requires_grad_()
    places = torch.tensor([[[0.0, 0.0], [20.0, 20.0], [40.0, 10.0]]])
    distance = distance_to_outline(polygon, places)
    assert distance.abs().max() < 2e-3
    (gradient,) = torch.autograd.grad(distance.sum(), polygon)
    assert gradient.isfinite().all()


def test_a_contour_learns_its_place_from_areas_alone():
    true = with_edges_halved(square(20, 20))
    torch.manual_seed(0)
    contour = (true + torch.randn_like(true)).requires_grad_()
    before = area_loss(contour, true).item()
    optimizer = torch.optim.Adam([contour], lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        area_loss(contour, true).sum().backward()
        optimizer.step()
    assert area_loss(contour, true).item() < before / 5
    assert area_iou(contour.detach(), true) > 0.96


def test_a_hole_costs_its_area():
    outer, hole = square(), square(10, 5, 20, 10)
    bridged = torch.cat([outer, outer[:, :1], hole, hole[:, :1]], dim=1)
    assert area_iou(bridged, outer).item() == pytest.approx(1 - 200 / 800, abs=0.03)
    assert area_loss(bridged, outer).item() == pytest.approx(200 / 800, abs=0.03)
    assert area_loss(bridged, bridged) == 0


def test_what_encloses_nothing():
    point = torch.full((1, 36, 2), 7.0, requires_grad=True)
    assert area_iou(point.detach(), point.detach()) == 0
    loss = area_loss(point, point.detach() + 3)
    loss.sum().backward()
    assert loss.isfinite().all() and point.grad.isfinite().all()
    none = torch.zeros(0, 36, 2)
    assert area_iou(none, none).shape == area_loss(none, none).shape == (0,)


def test_half_precision_of_autocast_does_not_reach_places():
    a, b = square(3000.0), square(3001.0)
    expected = area_loss(a, b), area_iou(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = area_loss(a, b), area_iou(a, b)
    torch.testing.assert_close(found, expected)


def test_weight_in_the_third_stage():
    true = with_edges_halved(square()).repeat(2, 1, 1)
    targets = LandmarkTargets.make(true, span_boxes(true))
    moved = true + torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
    alone, both = (
        ContourBranch(num_points=32, area_weight=weight).displacement_loss(moved, targets)
        for weight in (0.0, 3.0)
    )
    torch.testing.assert_close(both, alone + 3 * area_loss(moved, true))
    torch.testing.assert_close(
        ContourBranch(num_points=32).quality(moved, targets), area_iou(moved, true)
    )


def test_weight_from_a_config():
    model = tiny_model(TASK="segm", CONTOUR_AREA_LOSS_WEIGHT=2.5)
    assert model.branches[0].area_weight == 2.5
    with pytest.raises(ValueError, match=r"MODEL\.LSNET\.CONTOUR_AREA_LOSS_WEIGHT is -1.0"):
        tiny_model(TASK="segm", CONTOUR_AREA_LOSS_WEIGHT=-1.0)


@pytest.mark.parametrize("away", [0.0, 5000.0])
def test_edges_are_told_apart_anywhere_in_an_image(away):
    polygons, places = with_edges_halved(square()) + away, away + 40 * torch.rand(1, 50, 2)
    start, along = polygons, polygons.roll(-1, 1) - polygons
    every = to_segment(places[:, :, None], start[:, None], along[:, None]).norm(dim=3)
    torch.testing.assert_close(
        distance_to_outline(polygons, places), every.amin(2), rtol=0, atol=0.005
    )

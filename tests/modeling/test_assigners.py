import pytest
import torch
from parity import Recorded

from lsnet_d2.modeling import assigners
from lsnet_d2.modeling.assigners import assign_atss, assign_nearest, pairwise_iou_inverted
from lsnet_d2.modeling.points import make_anchor_points

CASES = ["none", "one", "few", "many", "tiny", "large", "crowded"]
STRIDES = [8, 16, 32, 64, 128]


def points_of(level_hw):
    sizes = [tuple(hw) for hw in level_hw.tolist()]
    return make_anchor_points(sizes, STRIDES[: len(sizes)], torch.device("cpu"))


def quadrilateral_centroids(extremes):
    """Centroid by area of the quadrilaterals of four extreme points (G, 4, 2)."""
    following = extremes.roll(-1, dims=1)
    cross = extremes[..., 0] * following[..., 1] - following[..., 0] * extremes[..., 1]
    return ((extremes + following) * cross[..., None]).sum(1) / (3 * cross.sum(1, keepdim=True))


@pytest.mark.parametrize("num_positives", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_nearest_centre_is_that_of_the_released_code(parity, case, num_positives):
    recorded = Recorded("comp_centroid_assigner.npz", f"{case}.")
    points = points_of(recorded["level_hw"])
    assigned = assign_nearest(
        points.xy, STRIDES, points.per_level, recorded["gt_boxes"], num_positives=num_positives
    )
    expected = recorded[f"gt_inds_center_pos{num_positives}"]
    parity.equal("init assignment, by centres", assigned + 1, expected)


@pytest.mark.parametrize("num_positives", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_nearest_centroid_is_that_of_the_released_code(parity, case, num_positives):
    recorded = Recorded("comp_centroid_assigner.npz", f"{case}.")
    points = points_of(recorded["level_hw"])
    extremes = recorded["gt_extremes"].view(-1, 5, 2)[:, :4].double()
    assigned = assign_nearest(
        points.xy,
        STRIDES,
        points.per_level,
        recorded["gt_boxes"],
        gt_centers=quadrilateral_centroids(extremes).float(),
        num_positives=num_positives,
    )
    expected = recorded[f"gt_inds_centroid_pos{num_positives}"]
    parity.equal("init assignment, by centroids", assigned + 1, expected)


@pytest.mark.parametrize("case", CASES)
def test_atss_is_that_of_the_released_code(parity, case):
    recorded = Recorded("comp_atss_assigner.npz", f"{case}.")
    per_level = recorded["level_hw"].prod(1).tolist()
    assigned, quality = assign_atss(recorded["boxes"], per_level, recorded["gt_boxes"])
    parity.equal("refine assignment (ATSS)", assigned + 1, recorded["gt_inds"])
    positive = assigned >= 0
    overlaps, expected = quality[positive], recorded["max_overlaps"][positive]
    parity.absolute("refine assignment (ATSS), IOU", overlaps, expected, within=1e-5)
    assert (quality[~positive] == 0).all()


def test_the_nearer_object_gets_a_shared_point_and_the_other_none():
    points = points_of(torch.tensor([[4, 4], [2, 2], [1, 1]]))
    boxes = torch.tensor([[8.0, 8.0, 22.0, 22.0], [4.0, 4.0, 26.0, 26.0]])  # centre 15, 15
    points_per_level = points.per_level
    assigned = assign_nearest(points.xy, STRIDES[:3], points_per_level, boxes)
    # Equal centres: relative to its size the larger object is nearer.
    assert assigned.tolist().count(1) == 1 and assigned.tolist().count(0) == 0
    assert points.xy[assigned == 1].tolist() == [[16.0, 16.0]]


def test_equal_claims_go_to_the_first_object():
    points = points_of(torch.tensor([[4, 4], [2, 2], [1, 1]]))
    boxes = torch.tensor([[8.0, 8.0, 22.0, 22.0]]).repeat(3, 1)
    assigned = assign_nearest(points.xy, STRIDES[:3], points.per_level, boxes)
    assert assigned.unique().tolist() == [-1, 0]


@pytest.mark.parametrize(
    ("side", "level"), [(1, 0), (63.9, 0), (64, 1), (127, 1), (128, 2), (511, 3), (9999, 4)]
)
def test_level_follows_the_size(side, level):
    sizes = [(128 >> i, 128 >> i) for i in range(5)]
    points = make_anchor_points(sizes, STRIDES, torch.device("cpu"))
    assigned = assign_nearest(
        points.xy, STRIDES, points.per_level, torch.tensor([[0.0, 0.0, side, side]])
    )
    assert points.strides[assigned >= 0].tolist() == [STRIDES[level]]


def test_invalid_points_are_never_assigned():
    points = points_of(torch.tensor([[4, 4], [2, 2], [1, 1]]))
    boxes = torch.tensor([[0.0, 0.0, 30.0, 30.0]])
    valid = torch.zeros(len(points.xy), dtype=torch.bool)
    assigned = assign_nearest(points.xy, STRIDES[:3], points.per_level, boxes, valid=valid)
    assert (assigned == -1).all()
    predicted = boxes.expand(len(points.xy), 4)
    assigned, _ = assign_atss(predicted, points.per_level, boxes, valid=valid)
    assert (assigned == -1).all()


def test_atss_takes_what_small_levels_have():
    points = points_of(torch.tensor([[2, 2], [1, 1], [1, 1]]))
    gt_boxes = torch.tensor([[0.0, 0.0, 16.0, 16.0]])
    predicted = torch.cat([points.xy - 4, points.xy + 12], dim=1)
    predicted[1] = gt_boxes[0]
    assigned, quality = assign_atss(predicted, points.per_level, gt_boxes, topk=9)
    assert assigned[1] == 0 and quality[1] == 1
    one_candidate, _ = assign_atss(predicted[:1], [1], gt_boxes)
    assert one_candidate.tolist() == [0]


def test_assignment_does_not_depend_on_the_order_of_objects():
    recorded = Recorded("comp_atss_assigner.npz", "crowded.")
    per_level = recorded["level_hw"].prod(1).tolist()
    order = torch.randperm(len(recorded["gt_boxes"]), generator=torch.Generator().manual_seed(0))
    assigned, _ = assign_atss(recorded["boxes"], per_level, recorded["gt_boxes"])
    shuffled, _ = assign_atss(recorded["boxes"], per_level, recorded["gt_boxes"][order])
    assert torch.equal(torch.where(shuffled >= 0, order[shuffled], -1), assigned)


def test_iou_of_inverted_boxes():
    box = torch.tensor([0.0, 0.0, 2.0, 2.0])
    shifted = torch.tensor([1.0, 0.0, 3.0, 2.0])
    inverted = torch.tensor([2.0, 0.0, 0.0, 2.0])
    assert pairwise_iou_inverted(box, shifted).item() == pytest.approx(2 / 6)
    assert pairwise_iou_inverted(inverted, box).item() == 0


def test_objects_in_portions(monkeypatch):
    """The assignment does not depend on how many objects are looked at together."""
    generator = torch.Generator().manual_seed(0)
    sizes, strides = [(20, 30), (10, 15), (5, 8)], [8, 16, 32]
    points = make_anchor_points(sizes, strides, torch.device("cpu"))
    low = torch.rand(50, 2, generator=generator) * torch.tensor([200.0, 130.0])
    objects = torch.cat([low, low + torch.rand(50, 2, generator=generator) * 60 + 8], dim=1)
    predicted = torch.cat([points.xy - 15, points.xy + 15], dim=1)
    valid = torch.rand(len(points.xy), generator=generator) < 0.9

    def assign():
        levels = points.per_level
        nearest = assign_nearest(points.xy, strides, levels, objects, valid=valid, num_positives=4)
        return nearest, *assign_atss(predicted, levels, objects, valid=valid)

    together = assign()
    assert (together[0] >= 0).sum() > 50 and (together[1] >= 0).sum() > 30
    monkeypatch.setattr("lsnet_d2.modeling.assigners._DISTANCES_AT_ONCE", 1000)
    for ours, expected in zip(assign(), together, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("scatter", [0.0, 5.0, 300.0])
@pytest.mark.parametrize("count", [1, 4, 9])
def test_nearest_points_are_those_of_all(scatter, count):
    """Also where blocks of points lie anywhere, so that bounds exclude little, or at infinity."""
    generator = torch.Generator().manual_seed(count)
    y, x = torch.meshgrid(torch.arange(60.0), torch.arange(101.0), indexing="ij")
    places = 8 * torch.stack([x, y], dim=-1).view(-1, 2)
    places += scatter * torch.randn(places.shape, generator=generator)
    places[torch.rand(len(places), generator=generator) < 0.1] = torch.inf
    places[:700] = torch.inf
    centers = torch.rand(40, 2, generator=generator) * torch.tensor([900.0, 500.0])
    units = 1 + 20 * torch.rand(40, 2, generator=generator)
    found, index = assigners._nearest(places, centers, units, count)
    every = ((places - centers[:, None]) / units[:, None]).square().sum(-1).sqrt()
    assert torch.equal(found, every.sort(dim=1).values[:, :count])
    assert torch.equal(found, every.gather(1, index))
    assert all(len(set(row)) == count for row in index.tolist())

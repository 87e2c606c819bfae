import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity import Recorded
from torchvision.ops import box_iou

from lsnet_d2.modeling.corner_targets import corner_radius, corner_targets, semantic_targets
from lsnet_d2.modeling.points import make_anchor_points

CASES = ["none", "one", "few", "many", "tiny", "large", "crowded"]
STRIDES = [8, 16, 32, 64, 128]


def points_of(height, width):
    sizes = [(-(-height // stride), -(-width // stride)) for stride in STRIDES]
    return make_anchor_points(sizes, STRIDES, torch.device("cpu"))


def everywhere(points):
    return torch.ones_like(points.xy[:, 0], dtype=torch.bool)


@pytest.mark.parametrize("case", CASES)
def test_corners_are_those_of_the_released_code(parity, case):
    recorded = Recorded("comp_hm_assigner.npz", f"{case}.")
    sizes = [tuple(hw) for hw in recorded["level_hw"].tolist()]
    points = make_anchor_points(sizes, STRIDES, torch.device("cpu"))
    heat, offsets = corner_targets(points, recorded["gt_boxes"], everywhere(points))
    for corner, name in enumerate(("tl", "br")):
        ours, theirs = heat[:, corner], recorded[f"hm_{name}"]
        parity.relative("corner heat targets", ours, theirs, within=1e-5, least=0.1)
        positive = torch.nonzero(heat[:, corner] == 1).squeeze(1)
        parity.equal("corner points", positive, recorded[f"pos_{name}"])
        # Where objects have one point, the released code takes the last of them.
        shared = torch.isin(positive, recorded[f"collisions_{name}"])
        alone = positive[~shared]
        expected = recorded[f"off_{name}"]
        ours, theirs = offsets[alone, corner], expected[alone]
        parity.absolute("corner offset targets", ours, theirs, within=1e-5, unit="cells")
        assert (offsets[heat[:, corner] < 1, corner] == 0).all()
        shared = positive[shared]
        ours, theirs = offsets[shared, corner].norm(dim=1), expected[shared].norm(dim=1)
        assert (ours <= theirs + 1e-5).all()


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_the_nearer_of_two_objects_has_the_point(order):
    points = points_of(64, 64)
    boxes = torch.tensor([[17.0, 9.0, 40.0, 40.0], [18.0, 10.0, 50.0, 50.0]])[order]
    heat, offsets = corner_targets(points, boxes, everywhere(points))
    point = torch.nonzero((points.xy == torch.tensor([16.0, 8.0])).all(dim=1))[0].item()
    assert heat[point, 0] == 1
    assert offsets[point, 0].tolist() == [1 / 8, 1 / 8]


def test_every_object_is_on_every_level():
    points = points_of(256, 256)
    box = torch.tensor([[60.0, 70.0, 90.0, 170.0]])
    heat, offsets = corner_targets(points, box, everywhere(points))
    for corner, place in enumerate(box.view(2, 2)):
        peaks = torch.nonzero(heat[:, corner] == 1).squeeze(1)
        assert points.levels[peaks].tolist() == [0, 1, 2, 3, 4]
        found = points.xy[peaks] + offsets[peaks, corner] * points.strides[peaks, None]
        torch.testing.assert_close(found, place.expand(5, 2))


def test_points_off_the_image_are_cold():
    points = points_of(64, 128)
    valid = points.xy[:, 0] < 64
    heat, offsets = corner_targets(points, torch.tensor([[70.0, 10.0, 120.0, 60.0]]), valid)
    assert (heat[~valid] == 0).all() and (offsets[~valid] == 0).all()
    assert (heat == 1).sum() == 2 * len(STRIDES)


@given(st.floats(1, 500), st.floats(1, 500), st.floats(0.3, 0.9))
def test_the_radius_keeps_the_overlap(width, height, overlap):
    (radius,) = corner_radius(torch.tensor([[width, height]], dtype=torch.float64), overlap)
    box = torch.tensor([[0, 0, width, height]], dtype=torch.float64)
    signs = torch.tensor([[1, 1, 1, 1], [-1, -1, -1, -1], [1, 1, -1, -1], [-1, -1, 1, 1]])
    ious = box_iou(box, box + radius * signs)
    assert ious.min().item() == pytest.approx(overlap, abs=1e-9)


@pytest.mark.parametrize("run", ["sem0", "sem1"])
def test_the_semantic_map_is_that_of_the_released_code(parity, run):
    recorded = Recorded("comp_cpv.npz", f"{run}.")
    points = points_of(*recorded["pad_hw"].tolist())
    classes = recorded["labels"].long()
    weights = semantic_targets(points, recorded["boxes"], classes, everywhere(points), 80)
    finest = weights[: points.per_level[0]].T.view(80, *points.sizes[0])
    present = recorded["classes"].long()
    parity.equal("semantic map", finest[present] > 0, recorded["map"].bool())
    ours, theirs = finest[present], recorded["weights"]
    parity.relative("semantic map, weights", ours, theirs, within=1e-6)
    absent = torch.ones(80, dtype=torch.bool).index_fill(0, present, False)
    assert (finest[absent] == 0).all()


@pytest.mark.parametrize("run", ["even", "odd", "empty1", "empty2"])
def test_semantic_maps_of_a_batch_are_those_of_the_released_code(parity, run):
    images, recorded = Recorded(f"images_{run}.npz"), Recorded(f"model_bbox_cpv_r50_{run}.npz")
    points = points_of(*images["batch_hw"].tolist())
    maps = []
    for i in range(2):
        valid = (points.xy < images["pad_shape"][i].flip(0)).all(dim=1)
        boxes, classes = recorded[f"gt_boxes_{i}"], recorded[f"gt_labels_{i}"]
        maps.append(semantic_targets(points, boxes, classes, valid, 80))
    finest = torch.stack(maps)[:, : points.per_level[0]].mT.unflatten(2, points.sizes[0])
    assert list(finest.shape) == recorded["gt_sem_shape"].tolist()
    expected = torch.zeros_like(finest)
    expected[tuple(recorded["gt_sem_nonzero"].long().T)] = recorded["gt_sem_weight_values"]
    parity.relative("semantic map of a batch, weights", finest, expected, within=1e-6)


def test_the_smallest_of_overlapping_objects_counts():
    points = points_of(64, 64)
    boxes = torch.tensor([[0.0, 0.0, 63.0, 63.0], [16.0, 16.0, 31.0, 31.0], [0.0, 0.0, 9.0, 9.0]])
    for order in ([0, 1, 2], [2, 1, 0]):
        weights = semantic_targets(
            points, boxes[order], torch.tensor([1, 1, 0])[order], everywhere(points), 3
        )
        finest = weights[:64].view(8, 8, 3)
        assert finest[2, 3, 1].item() == pytest.approx(1 / 15**2)
        assert finest[4, 4, 1].item() == pytest.approx(1 / 63**2)
        assert (finest[..., 0] > 0).sum() == 4
        assert (finest[..., 2] == 0).all()
        # Level by level the map is thinned out.
        assert torch.equal(weights[64:80].view(4, 4, 3), finest[::2, ::2])

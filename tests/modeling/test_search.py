import math

import pytest
import torch
from detectron2.utils.events import EventStorage
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import make_input, tiny_model

from lsnet_d2.layers import PointSampler
from lsnet_d2.modeling.polish import PolishStep
from lsnet_d2.modeling.search import LandmarkSearch, SearchResult, sample_own_heatmaps

STRIDE = 4
BOXES = [[10, 12, 60, 70], [70, 20, 120, 90], [30, 40, 44, 60]]
LSNET = {
    "TASK": "pose_bbox",
    "NUM_KEYPOINTS": 5,
    "POLISH_IN_FEATURES": ["p3", "p4"],
    "KEYPOINT_SEARCH": True,
}


def peak(x, y, height=12, width=20, value=20.0):
    """A map with one cell that stands out."""
    single = torch.zeros(height, width)
    single[y // STRIDE, x // STRIDE] = value
    return single


def test_each_landmark_reads_its_own_map():
    torch.manual_seed(0)
    maps, image = torch.randn(2, 3, 9, 14), torch.tensor([0, 1, 1, 0])
    x, y = 52 * torch.rand(4, 3, 5), 32 * torch.rand(4, 3, 5)
    found = sample_own_heatmaps(maps, STRIDE, image, x, y)
    points = torch.stack([x[:, :, None].expand_as(found), y[..., None].expand_as(found)], dim=-1)
    every = PointSampler([maps], [STRIDE])(image, points.flatten(1, 3)).view(4, 3, 5, 5, 3)
    torch.testing.assert_close(found, torch.stack([every[:, v, ..., v] for v in range(3)], 1))


@pytest.mark.parametrize("size, seen", [(40.0, True), (12.0, False)])
def test_a_landmark_is_found_within_reach_of_the_object_s_size(size, seen):
    search = LandmarkSearch(2, reach=0.25)
    maps = torch.stack([peak(48, 24), peak(40, 16)])[None]
    start = torch.tensor([[[40.0, 24.0], [40.0, 24.0]]])  # 8 pixels beside the peaks
    sought = search(maps, STRIDE, torch.tensor([0]), start, torch.full((1, 1, 1), size))
    expected = torch.tensor([[[8.0, 0.0], [0.0, -8.0]]]) / size * seen
    torch.testing.assert_close(sought.expectation()[0], expected, atol=0.03, rtol=0)
    assert (sought.expectation()[1].min() > 0.5) == seen


@pytest.mark.parametrize("x, y", [(0.0, 0.0), (36.0, 20.0), (76.0, 44.0), (200.0, -50.0)])
def test_the_border_of_a_map_leads_nowhere(x, y):
    """A map that says nowhere is the same on the border, and beyond."""
    search = LandmarkSearch(1, reach=0.3)
    start, size = torch.tensor([[[x, y]]]), torch.full((1, 1, 1), 60.0)
    empty = torch.full((1, 1, 12, 20), -6.0)
    offset = search(empty, STRIDE, torch.tensor([0]), start, size).expectation()[0]
    torch.testing.assert_close(offset, torch.zeros(1, 1, 2), atol=1e-5, rtol=0)


def test_low_precision_does_not_move_what_is_found():
    search = LandmarkSearch(1, reach=0.3)
    heatmaps = peak(48, 24, value=6.0)[None, None].bfloat16()
    start, size = torch.full((1, 1, 2), 36.0), torch.full((1, 1, 1), 60.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = search(heatmaps, STRIDE, torch.tensor([0]), start, size).expectation()[0]
    full = search(heatmaps.float(), STRIDE, torch.tensor([0]), start, size).expectation()[0]
    assert low.dtype == torch.float32 and full.abs().max() > 0.01
    torch.testing.assert_close(low, full)


def test_it_searches_in_the_landmarks_own_image():
    search = LandmarkSearch(1, reach=0.25)
    maps = torch.stack([peak(40, 24), peak(48, 24)])[:, None]
    start, size = torch.full((2, 1, 2), 40.0), torch.full((2, 1, 1), 40.0)
    start[..., 1] = 24.0
    way = search(maps, STRIDE, torch.tensor([1, 0]), start, size).expectation()[0]
    torch.testing.assert_close(way[:, 0, 0] * 40, torch.tensor([8.0, 0.0]), atol=1.0, rtol=0)


def test_nothing_is_found_where_nothing_is_known():
    """The middle of the window is as good as its surroundings on all sides."""
    sought = LandmarkSearch(3, reach=0.3)(
        torch.zeros(1, 3, 9, 14),
        STRIDE,
        torch.tensor([0, 0]),
        torch.rand(2, 3, 2) * 30,
        torch.full((2, 1, 1), 30.0),
    )
    torch.testing.assert_close(sought.expectation()[0], torch.zeros(2, 3, 2), atol=1e-6, rtol=0)


def result_of(logits, size=10.0, reach=0.25, count=11):
    ticks = torch.linspace(-reach, reach, count)
    lattice = torch.cartesian_prod(ticks, ticks).flip(1)
    return SearchResult(
        logits, torch.zeros(*logits.shape[:2], 2), torch.full((1, 1, 1), size), lattice
    )


def test_loss_is_the_cross_entropy_of_the_places_around():
    torch.manual_seed(0)
    sought = result_of(torch.randn(1, 1, 121))
    log_probs = sought.logits.log_softmax(2)[0, 0].view(11, 11)

    def loss(x, y, visible=True):
        """Of a landmark x columns and y rows of the lattice from the middle."""
        place = torch.tensor([[[x, y]]]) * 0.5
        return sought.loss(place, torch.tensor([[visible]])).item()

    assert loss(0.0, 0.0) == pytest.approx(-log_probs[5, 5].item())
    assert loss(3.0, -2.0) == pytest.approx(-log_probs[3, 8].item())
    assert loss(5.0, 5.0) == pytest.approx(-log_probs[10, 10].item())
    four = -(0.75 * log_probs[5, 5:7] + 0.25 * log_probs[6, 5:7]) @ torch.tensor([0.5, 0.5])
    assert loss(0.5, 0.25) == pytest.approx(four.item())
    assert loss(5.1, 0.0) == loss(0.0, -5.1) == 0  # out of the window
    assert loss(0.0, 0.0, visible=False) == 0


def test_loss_is_the_mean_over_the_landmarks_that_count():
    torch.manual_seed(0)
    sought = result_of(torch.randn(2, 3, 121))
    places = torch.rand(2, 3, 2) * 4 - 2
    visible = torch.tensor([[True, True, False], [False, False, False]])
    alone = [
        result_of(sought.logits[:1, v : v + 1]).loss(
            places[:1, v : v + 1], torch.ones(1, 1, dtype=torch.bool)
        )
        for v in (0, 1)
    ]
    expected = torch.stack([torch.stack(alone).mean(), torch.tensor(0.0)])
    torch.testing.assert_close(sought.loss(places, visible), expected)


@given(st.integers(0, 10_000), st.floats(0.5, 4.0))
def test_search_scales_with_the_object(seed, scale):
    """An object and its map, magnified, are searched the same way."""
    generator = torch.Generator().manual_seed(seed)
    search = LandmarkSearch(2, reach=0.3)
    maps = torch.randn(1, 2, 9, 14, generator=generator)
    start = torch.rand(1, 2, 2, generator=generator) * 30
    image, size = torch.tensor([0]), torch.full((1, 1, 1), 25.0)
    once = search(maps, 4.0, image, start, size).expectation()[0]
    magnified = search(maps, 4.0 * scale, image, start * scale, size * scale).expectation()[0]
    torch.testing.assert_close(once, magnified, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("trust, share", [(30.0, 1), (-30.0, 0)])
def test_the_third_stage_goes_where_a_landmark_was_found(trust, share):
    polish = PolishStep({"pose": 2}, 64, 1, stride=STRIDE, reach={"pose": 0.3})
    trusting = polish.branches["pose"].trust
    torch.nn.init.zeros_(trusting.weight)
    torch.nn.init.constant_(trusting.bias, trust)
    maps = torch.stack([peak(48, 24), peak(40, 16)])[None]
    landmarks = torch.tensor([[[44.0, 24.0], [36.0, 12.0]]])
    features = PointSampler([torch.zeros(1, 64, 12, 20)], [STRIDE])
    (moved,) = polish(features, torch.tensor([0]), [landmarks], {"pose": maps})
    expected = landmarks + share * moved.search.expectation()[0] * math.hypot(8, 12)
    torch.testing.assert_close(moved.landmarks, expected)
    if share:
        peaks = torch.tensor([[[48.0, 24.0], [40.0, 16.0]]])
        assert (moved.landmarks - peaks).norm(dim=2).max() < 2.5


def test_later_steps_search_closer():
    steps = tiny_model(**{**LSNET, "POLISH_STEPS": 3}).polish.steps
    reaches = [step.branches["pose"].search.lattice.max().item() for step in steps]
    assert reaches == pytest.approx([0.3, 0.15, 0.075])


def test_losses_and_gradients_of_a_model():
    model = tiny_model(**LSNET).train()
    with EventStorage():
        losses = model([make_input(BOXES, [0, 1, 2]), make_input(BOXES[:1], [1])])
    assert losses["loss_pose_search"] > 0
    assert "loss_bbox_search" not in losses
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert model.polish.heatmaps["pose"].weight.grad.abs().max() > 0


def test_maps_may_have_convolutions_of_their_own():
    torch.manual_seed(0)
    polish = tiny_model(**LSNET, KEYPOINT_SEARCH_CONVS=2).polish
    (tower,) = polish.towers.values()
    assert len(tower) == 2
    torch.nn.init.normal_(polish.heatmaps["pose"].weight)
    channels = tower[0][0].in_channels
    fine = [torch.randn(1, channels, size, size) for size in (16, 8)]
    corners = torch.tensor([[[20.0, 20.0], [20.0, 100.0], [100.0, 100.0], [100.0, 20.0]]])

    def found():
        ((_, pose),) = polish(fine, torch.tensor([0]), [corners, torch.full((1, 5, 2), 60.0)])
        return pose.search.expectation()[0]

    assert found().abs().max() > 0.01
    torch.nn.init.zeros_(tower[1][1].weight)  # of the norm: all places look alike
    torch.testing.assert_close(found(), torch.zeros(1, 5, 2), atol=1e-6, rtol=0)


def test_search_learns_where_a_landmark_looks_alike():
    """A keypoint that is always at the one bright cell, and never where it is sought first."""
    torch.manual_seed(0)
    search, paint = LandmarkSearch(1, reach=0.3), torch.nn.Conv2d(1, 1, 1)
    torch.nn.init.zeros_(paint.weight)
    optimizer = torch.optim.Adam([*search.parameters(), *paint.parameters()], lr=0.3)
    image, size = torch.arange(8), torch.full((8, 1, 1), 60.0)
    off = []
    for _ in range(60):
        cell = torch.randint(5, 15, (8, 2))
        maps = torch.zeros(8, 1, 20, 20)
        maps[image, 0, cell[:, 1], cell[:, 0]] = 1.0
        true = (STRIDE * cell).float()[:, None]
        start = true + torch.rand(8, 1, 2) * 24 - 12
        sought = search(paint(maps), STRIDE, image, start, size)
        loss = sought.loss(true, torch.ones(8, 1, dtype=torch.bool)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        off.append((start + 60 * sought.expectation()[0] - true).norm(dim=2).mean().item())
    assert off[0] > 8 and sum(off[-5:]) / 5 < 2

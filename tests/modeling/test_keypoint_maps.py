import math

import pytest
import torch
from detectron2.utils.events import EventStorage
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import make_input, tiny_model

from lsnet_d2.layers import sample_features
from lsnet_d2.modeling.keypoint_maps import KeypointMaps, keypoints_around
from lsnet_d2.modeling.landmarks import LandmarkTargets
from lsnet_d2.modeling.polish import LandmarkPolish

SIZE = 9, 14
STRIDE = 4
BOXES = [[10, 12, 60, 70], [70, 20, 120, 90], [30, 40, 44, 60]]
LSNET = {
    "TASK": "pose_bbox",
    "NUM_KEYPOINTS": 5,
    "POLISH_IN_FEATURES": ["p3", "p4"],
    "KEYPOINT_MAPS": True,
}


def random_targets(seed, objects=3, keypoints=4):
    """Keypoints of small and large objects, some invisible, some beyond the border of the map."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([STRIDE * SIZE[1], STRIDE * SIZE[0]])
    landmarks = torch.rand(objects, keypoints, 2, generator=generator) * 1.2 * scale - 0.1 * scale
    sides = torch.rand(objects, 2, generator=generator) * 300
    boxes = torch.cat([torch.zeros(objects, 2), sides], dim=1)
    visible = torch.rand(objects, keypoints, generator=generator) < 0.7
    return LandmarkTargets.make(landmarks, boxes, visible=visible)


def one(places, visible=None, box=(0, 0, 40, 30)):
    """An object with one kind of keypoint for each of the places."""
    places = torch.tensor([places], dtype=torch.float32)
    visible = None if visible is None else torch.tensor([visible])
    return LandmarkTargets.make(places, torch.tensor([box], dtype=torch.float32), visible=visible)


@given(st.integers(0, 10_000))
def test_the_nearest_keypoint_of_each_kind(seed):
    targets = random_targets(seed)
    heat, way, reach = keypoints_around(targets, SIZE, STRIDE)
    places = targets.landmarks / STRIDE
    for kind in range(places.shape[1]):
        for i in range(0, SIZE[0], 3):
            for j in range(0, SIZE[1], 3):
                found = []
                for place, visible, box in zip(
                    places[:, kind], targets.visible[:, kind], targets.boxes, strict=True
                ):
                    x, y = (place - torch.tensor([j, i])).tolist()
                    own = min(max(0.15 * math.hypot(*box[2:].tolist()) / STRIDE, 2), 8)
                    if visible:
                        found.append((math.hypot(x, y) / own, x, y, own))
                near = [entry for entry in found if entry[0] < 1]
                if near:
                    _, x, y, own = min(near)
                    assert way[kind, :, i, j].tolist() == pytest.approx([x, y], abs=1e-4)
                    assert reach[kind, i, j] == pytest.approx(own, rel=1e-4)
                else:
                    assert reach[kind, i, j] == 0 and way[kind, :, i, j].abs().max() == 0
                hottest = max(
                    (
                        math.exp(-(x * x + y * y) / 2)
                        for _, x, y, _ in found
                        if math.hypot(x, y) < 4
                    ),
                    default=0,
                )
                peak = any(abs(x) <= 0.5 and abs(y) <= 0.5 for _, x, y, _ in found)
                assert heat[kind, i, j] == pytest.approx(1 if peak else hottest, abs=1e-5)


def test_a_hot_cell_for_each_visible_keypoint_on_the_map():
    heat, _, reach = keypoints_around(
        one([[9.0, 7.0], [21.0, 30.0], [400.0, 7.0]], visible=[True, False, True]), SIZE, STRIDE
    )
    assert (heat == 1).nonzero().tolist() == [[0, 2, 2]]
    assert heat[1].max() == 0 and reach[1:].max() == 0
    assert heat[0, 2, 3] == pytest.approx(math.exp(-(0.75**2 + 0.25**2) / 2))


def test_no_objects():
    empty = LandmarkTargets.make(torch.zeros(0, 5, 2), torch.zeros(0, 4))
    heat, way, reach = keypoints_around(empty, SIZE, STRIDE)
    assert heat.shape == reach.shape == (5, *SIZE) and way.shape == (5, 2, *SIZE)
    assert heat.abs().max() == way.abs().max() == reach.abs().max() == 0


def constant_maps(heat, way, known=True):
    """Losses of maps that are the same everywhere, with a keypoint on a cell and an unknown one."""
    maps = KeypointMaps(channels=64, num_keypoints=2, stride=STRIDE, loss_weights=(1.0, 1.0))
    for layer, value in ((maps.heat, [heat] * 2), (maps.displacement, [*way] * 2)):
        torch.nn.init.zeros_(layer.weight)
        layer.bias.data.copy_(torch.tensor(value))
    targets = one([[8.0, 12.0], [0.0, 0.0]], visible=[True, False])
    cells = torch.full((1, *SIZE), known)
    losses = maps.losses(torch.zeros(1, 64, *SIZE), [targets], [torch.tensor([0])], cells)
    return {name: loss.item() for name, loss in losses.items()}


def test_losses():
    right = constant_maps(-30.0, (0.0, 0.0))
    assert right["loss_heat"] == pytest.approx(30)  # of the one hot cell alone
    # Within two cells of the keypoint are nine, at distances that add up to 8 in x and y together.
    assert right["loss_way"] == pytest.approx((4 * 1 + 4 * 2) / 9 / 2)
    hot = constant_maps(0.0, (0.0, 0.0))["loss_heat"]
    weights = [
        (1 - math.exp(-((i - 3) ** 2 + (j - 2) ** 2) / 2)) ** 4
        for i in range(SIZE[0])
        for j in range(SIZE[1])
    ]
    cold = sum(weights) + math.prod(SIZE)
    assert hot == pytest.approx(0.25 * math.log(2) * (1 + cold), rel=1e-4)
    assert constant_maps(3.0, (1.0, 1.0), known=False) == {"loss_heat": 0, "loss_way": 0}


def keypoint_maps():
    torch.manual_seed(0)
    maps = KeypointMaps(channels=64, num_keypoints=3, stride=STRIDE, loss_weights=(1.0, 1.0))
    torch.nn.init.normal_(maps.displacement.weight)
    return maps


def test_landmarks_read_their_own_maps():
    maps = keypoint_maps()
    feature = torch.randn(2, 64, *SIZE)
    landmarks, image = torch.rand(5, 3, 2) * 30, torch.tensor([0, 1, 1, 0, 1])
    heat, way = maps.read(sample_features(feature, STRIDE, image, landmarks))
    every = torch.cat([maps.heat(feature), maps.displacement(feature)], dim=1)
    every = sample_features(every, STRIDE, image, landmarks)
    for v in range(3):
        torch.testing.assert_close(heat[:, v, 0], every[:, v, v], rtol=1e-4, atol=1e-5)
        own = every[:, v, [3 + 2 * v, 4 + 2 * v]]
        torch.testing.assert_close(way[:, v], own, rtol=1e-4, atol=1e-4)
    # Beyond the map nothing is known.
    heat, _ = maps.read(sample_features(feature, STRIDE, image, landmarks + 1000))
    assert heat.sigmoid().flatten().tolist() == pytest.approx([0.02] * 15)


def test_nothing_moves_at_first():
    maps = KeypointMaps(channels=64, num_keypoints=2, stride=STRIDE, loss_weights=(1.0, 1.0))
    polish = LandmarkPolish(2, 64, [STRIDE], 1, guided=True)
    landmarks = torch.rand(4, 2, 2) * 30
    features, image = [torch.randn(1, 64, *SIZE)], torch.zeros(4, dtype=torch.long)
    ((moved, _),) = polish(features, image, landmarks, maps)
    torch.testing.assert_close(moved, landmarks)


@pytest.mark.parametrize("trust, share", [(30.0, 1), (-30.0, 0)])
def test_the_third_stage_goes_where_the_maps_lead(trust, share):
    maps = KeypointMaps(channels=64, num_keypoints=2, stride=STRIDE, loss_weights=(1.0, 1.0))
    maps.displacement.bias.data.copy_(torch.tensor([1.0, 0.0, 0.0, -0.5]))
    polish = LandmarkPolish(2, 64, [STRIDE], 1, guided=True)
    torch.nn.init.zeros_(polish.steps[0].trust.weight)
    torch.nn.init.constant_(polish.steps[0].trust.bias, trust)
    landmarks = torch.tensor([[[20.0, 20.0], [30.0, 12.0]]])
    features, image = [torch.zeros(1, 64, *SIZE)], torch.tensor([0])
    ((moved, _),) = polish(features, image, landmarks, maps)
    expected = landmarks + share * STRIDE * torch.tensor([[1.0, 0.0], [0.0, -0.5]])
    torch.testing.assert_close(moved, expected)


def test_losses_are_computed_in_full_precision():
    maps, feature = keypoint_maps(), torch.randn(2, 64, *SIZE)
    images = [one([[8.0, 12.0], [20.0, 30.0], [0.0, 0.0]]), random_targets(1, keypoints=3)]
    known = torch.ones(2, *SIZE, dtype=torch.bool)
    full = maps.losses(feature, images, [], known)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = maps.losses(feature, images, [], known)
    for name, loss in low.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(full[name].item(), rel=0.02)


def with_keypoints(count=3):
    image = make_input(BOXES, [0, 1, 2])
    image["instances"].gt_keypoints.tensor[count:, :, 2] = 0
    return image


def known_to_the_maps(image, **lsnet):
    model = tiny_model(**LSNET, **lsnet).train()
    maps = model.polish.maps["pose"]
    seen = {}
    losses = maps.losses

    def spy(feature, targets, classes, known):
        seen.update(targets=targets[0], known=known[0])
        return losses(feature, targets, classes, known)

    maps.losses = spy
    with EventStorage():
        model([image])
    return seen["targets"], seen["known"]


def test_objects_without_keypoints_are_not_background():
    targets, known = known_to_the_maps(with_keypoints(2))
    assert len(targets.landmarks) == 2
    x1, y1, x2, y2 = BOXES[2]
    for i, j in (~known).nonzero().tolist():
        assert x1 <= 8 * j < x2 and y1 <= 8 * i < y2
    assert not known.all()
    # but objects that cannot have any are
    targets, known = known_to_the_maps(with_keypoints(2), KEYPOINT_CLASSES=[0, 1])
    assert len(targets.landmarks) == 2 and known.all()


def test_maps_teach_the_features_of_the_third_stage():
    model = tiny_model(**LSNET).train()
    with EventStorage():
        losses = model([with_keypoints(), make_input([], [])])
    (losses["loss_heat"] + losses["loss_way"]).backward()
    maps = model.polish.maps["pose"]
    taught = (*model.polish.convs.parameters(), *maps.parameters(), model.backbone.stem.weight)
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in taught)
    assert all(parameter.grad is None for parameter in model.head.parameters())

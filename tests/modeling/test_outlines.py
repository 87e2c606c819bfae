import math

import pytest
import torch
from detectron2.utils.events import EventStorage
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import make_input, tiny_cfg, tiny_model

from lsnet_d2.modeling.areas import to_segment
from lsnet_d2.modeling.landmarks import LandmarkTargets, span_boxes
from lsnet_d2.modeling.outlines import (
    OutlineMaps,
    at_least_one,
    classes_of_cells,
    known_cells,
    mean_of,
    nearest_outline,
)

SIZE = 13, 17
BOXES = [[10, 12, 60, 70], [70, 20, 120, 90], [30, 40, 44, 60]]
LSNET = {"TASK": "segm", "POLISH_IN_FEATURES": ["p3", "p4"], "OUTLINE_MAPS": True}


def random_contours(seed, objects=4, vertices=9):
    """Some reach over the border of the map, and most cross themselves."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([4.0 * SIZE[1], 4.0 * SIZE[0]])
    return (torch.rand(objects, vertices, 2, generator=generator) * 1.4 - 0.2) * scale


def test_classes_of_cells():
    contours = torch.tensor(
        [[[0.0, 0], [0, 8], [8, 8], [8, 0]], [[4, 4], [4, 12], [12, 12], [12, 4]]]
    )
    covered = classes_of_cells(contours, torch.tensor([2, 0]), 3, (4, 4), 4)
    assert covered.sum(dim=(1, 2)).tolist() == [4, 0, 4]
    assert covered[:, 1, 1].tolist() == [1, 0, 1]  # both
    assert classes_of_cells(contours[:0], torch.tensor([]).long(), 3, (4, 4), 4).sum() == 0


@given(st.integers(0, 10_000))
def test_nearest_outline_is_that_of_all_segments(seed):
    contours = random_contours(seed) / 4
    displacement, near = nearest_outline(4 * contours, SIZE, 4)
    y, x = torch.meshgrid(torch.arange(SIZE[0]), torch.arange(SIZE[1]), indexing="ij")
    cells = torch.stack([x, y], dim=-1).view(-1, 2).float()
    start = contours.flatten(0, 1)
    along = contours.roll(-1, 1).flatten(0, 1) - start
    every = torch.stack([to_segment(cell[None], start, along) for cell in cells])
    distance = every.norm(dim=2).amin(dim=1).view(SIZE)
    assert torch.equal(near[distance < 1.499], torch.ones_like(near[distance < 1.499]))
    assert not near[distance > 1.501].any()
    torch.testing.assert_close(
        displacement.norm(dim=2)[near] / 4, distance[near], rtol=1e-4, atol=1e-4
    )
    assert displacement[~near].abs().sum() == 0


def test_no_outlines():
    displacement, near = nearest_outline(torch.zeros(0, 36, 2), SIZE, 4)
    assert not near.any() and displacement.abs().max() == 0


def square_losses(ignored, covering=0.0, displacement=(0.0, 0.0), image=(32, 32)):
    """Of constant maps, and a square of three by three cells within eight by eight."""
    maps = OutlineMaps(channels=64, num_classes=2, stride=4, loss_weights=(1.0, 1.0))
    for layer, value in ((maps.covering, [covering] * 2), (maps.displacement, displacement)):
        torch.nn.init.zeros_(layer.weight)
        layer.bias.data.copy_(torch.tensor(value))
    square = torch.tensor([[[10.0, 10.0], [10.0, 22.0], [22.0, 22.0], [22.0, 10.0]]])
    feature = torch.zeros(1, 64, 8, 8)
    regions = torch.tensor(ignored).view(-1, 4)
    known = known_cells((8, 8), 4, [image], [regions])
    targets = [LandmarkTargets.make(square, span_boxes(square))]
    losses = maps.losses(feature, targets, [torch.tensor([1])], known)
    return {name: loss.item() for name, loss in losses.items()}


def test_losses():
    covered = 3 * 3 / (2 * 64)  # of all cells and classes
    loss = square_losses([], covering=2.0)["loss_covering"]
    one, other = math.log1p(math.exp(-2)), math.log1p(math.exp(2))
    assert loss == pytest.approx(covered * one + (1 - covered) * other)
    # nothing is lost where the region leaves only what is right
    everything_but_inside = [[0, 0, 40, 12], [0, 24, 40, 40], [0, 0, 12, 40], [24, 0, 40, 40]]
    loss = square_losses(everything_but_inside, covering=30.0)["loss_covering"]
    assert loss == pytest.approx(30 / 2)  # of the other class
    # cells lie half a cell from the sides; within one and a half, all of them tell the distance
    rows = square_losses([[0, 0, 40, 13], [0, 20, 40, 40]], displacement=(0.5, 0.0))
    assert rows["loss_outline"] == pytest.approx(0.5)


def test_padding_of_a_batch_counts_nothing():
    alone = square_losses([], covering=2.0, displacement=(1.0, 0.0), image=(24, 28))
    cut = square_losses([[0, 24, 99, 99], [28, 0, 99, 99]], covering=2.0, displacement=(1.0, 0.0))
    assert alone == pytest.approx(cut)
    assert alone != square_losses([], covering=2.0, displacement=(1.0, 0.0))


def test_maps_teach_the_features_of_the_third_stage():
    model = tiny_model(**LSNET).train()
    with EventStorage():
        losses = model([make_input(BOXES, [0, 1, 2]), make_input([], [])])
    (losses["loss_covering"] + losses["loss_outline"]).backward()
    taught = (*model.polish.convs.parameters(), *model.polish.outlines.parameters())
    for parameter in (*taught, model.backbone.stem.weight):
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0


def test_objects_without_contours_are_not_background():
    model = tiny_model(
        TASK="joint",
        BRANCHES=["extreme", "contour"],
        **{key: value for key, value in LSNET.items() if key != "TASK"},
    ).train()
    seen = {}

    def losses(feature, targets, classes, known):
        seen.update(contours=targets[0].landmarks, classes=classes[0], known=known[0])
        return {"loss_covering": feature.sum(), "loss_outline": feature.sum()}

    model.polish.outlines["segm"].losses = losses
    image = make_input(BOXES, [0, 1, 2])
    image["instances"].gt_contours[1] = torch.nan
    image["ignore_boxes"] = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    with EventStorage():
        model([image])
    assert seen["classes"].tolist() == [0, 2]
    assert len(seen["contours"]) == 2
    regions = torch.tensor([[1.0, 2, 3, 4], BOXES[1]])
    size = image["image"].shape[1:]
    expected = known_cells(seen["known"].shape, 8, [size], [regions])[0]
    assert (seen["known"] == expected).all() and not seen["known"].all()


def test_nothing_is_computed_of_the_maps_at_test_time():
    model = tiny_model(**LSNET).eval()
    maps = model.polish.outlines["segm"]
    maps.covering.forward = maps.displacement.forward = None
    with torch.no_grad():
        model([make_input([], [])])


@pytest.mark.parametrize("change", [{"TASK": "bbox"}, {"OUTLINE_MAPS": False}])
def test_what_maps_need(change):
    assert len(tiny_model(**LSNET).polish.convs) == 2
    polish = tiny_model(**{**LSNET, **change}).polish
    assert len(polish.outlines) == len(polish.convs) == 0


JOINT = {
    "TASK": "joint",
    "BRANCHES": ["extreme", "contour", "keypoint"],
    "POLISH_IN_FEATURES": ["p3", "p4"],
    "OUTLINE_MAPS": True,
    "KEYPOINT_SEARCH": True,
}
NAMES = ["loss_covering", "loss_outline"]


def losses_of(**lsnet):
    model = tiny_model(**{**JOINT, **lsnet}).train()
    with EventStorage():
        losses = model([make_input(BOXES, [0, 1, 2]), make_input([], [])])
    return {name: loss.item() for name, loss in losses.items()}


def test_cells_on_the_image_and_in_no_ignored_region():
    regions = [torch.tensor([[0.0, 0.0, 8.0, 4.1]]), torch.zeros(0, 4)]
    known = known_cells((3, 4), 4, [(12, 16), (8, 10)], regions)
    assert known.int().tolist() == [
        [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]],
        [[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]],
    ]


def test_mean_of_what_counts():
    values = torch.tensor([1.0, 3.0, 100.0])
    assert mean_of(values, torch.tensor([True, True, False])) == 2
    assert mean_of(values, torch.zeros(3, dtype=torch.bool)) == 0
    assert at_least_one(torch.tensor(0)) == 1 and at_least_one(torch.tensor(7)) == 7


def test_weights_of_the_losses():
    key = "OUTLINE_MAPS_LOSS_WEIGHTS"
    once, other = losses_of(), losses_of(**{key: [8.0, 0.0]})
    first, second = NAMES
    default = tiny_cfg().MODEL.LSNET[key][0]
    assert other.pop(first) == pytest.approx(8 / default * once.pop(first))
    assert other.pop(second) == 0 and once.pop(second) > 0
    assert other == pytest.approx(once)
    with pytest.raises(ValueError, match=rf"MODEL.LSNET.{key} is \[1.0\]; .* 2 values"):
        tiny_model(**JOINT, **{key: [1.0]})


def test_maps_can_be_left_out():
    assert losses_of().keys() - losses_of(OUTLINE_MAPS=False).keys() == set(NAMES)


@pytest.mark.parametrize(
    "maps, search, convs", [(False, False, 0), (True, False, 2), (False, True, 2)]
)
def test_convolutions_where_maps_or_the_search_use_them(maps, search, convs):
    model = tiny_model(**{**JOINT, "OUTLINE_MAPS": maps, "KEYPOINT_SEARCH": search})
    assert len(model.polish.convs) == convs

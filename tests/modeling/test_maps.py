import pytest
import torch
from detectron2.utils.events import EventStorage
from tiny_model import make_input, tiny_cfg, tiny_model

from lsnet_d2.modeling.maps import at_least_one, known_cells, mean_of

BOXES = [[10, 12, 60, 70], [70, 20, 120, 90], [30, 40, 44, 60]]
LSNET = {
    "TASK": "joint",
    "BRANCHES": ["extreme", "contour", "keypoint"],
    "POLISH_IN_FEATURES": ["p3", "p4"],
    "OUTLINE_MAPS": True,
    "KEYPOINT_SEARCH": True,
}
NAMES = ["loss_covering", "loss_outline"]


def losses_of(**lsnet):
    model = tiny_model(**{**LSNET, **lsnet}).train()
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
        tiny_model(**LSNET, **{key: [1.0]})


def test_maps_can_be_left_out():
    assert losses_of().keys() - losses_of(OUTLINE_MAPS=False).keys() == set(NAMES)


@pytest.mark.parametrize(
    "maps, search, convs", [(False, False, 0), (True, False, 2), (False, True, 2)]
)
def test_convolutions_where_maps_or_the_search_use_them(maps, search, convs):
    model = tiny_model(**{**LSNET, "OUTLINE_MAPS": maps, "KEYPOINT_SEARCH": search})
    assert len(model.polish.convs) == convs

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
    "KEYPOINT_MAPS": True,
}
NAMES = {
    "OUTLINE_MAPS": ["loss_covering", "loss_outline"],
    "KEYPOINT_MAPS": ["loss_heat", "loss_way"],
}


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


@pytest.mark.parametrize("key", NAMES)
def test_weights_of_the_losses(key):
    once, other = losses_of(), losses_of(**{f"{key}_LOSS_WEIGHTS": [8.0, 0.0]})
    first, second = NAMES[key]
    default = tiny_cfg().MODEL.LSNET[f"{key}_LOSS_WEIGHTS"][0]
    assert other.pop(first) == pytest.approx(8 / default * once.pop(first))
    assert other.pop(second) == 0 and once.pop(second) > 0
    assert other == pytest.approx(once)
    with pytest.raises(
        ValueError, match=rf"MODEL.LSNET.{key}_LOSS_WEIGHTS is \[1.0\]; .* 2 values"
    ):
        tiny_model(**LSNET, **{f"{key}_LOSS_WEIGHTS": [1.0]})


@pytest.mark.parametrize("key", NAMES)
def test_either_can_be_left_out(key):
    assert losses_of().keys() - losses_of(**{key: False}).keys() == set(NAMES[key])
    without = tiny_model(**{**LSNET, **dict.fromkeys(NAMES, False)})
    assert len(without.polish.convs) == 0
    assert len(tiny_model(**{**LSNET, key: False}).polish.convs) == 2

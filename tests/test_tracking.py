import pytest
import torch
from detectron2.structures import Boxes, Instances

from lsnet_d2.tracking import Tracker


def frame(*objects):
    """Instances of objects (left edge, class): boxes of 40 x 40 pixels."""
    instances = Instances((200, 400))
    boxes = [[x, 50.0, x + 40, 90] for x, _ in objects]
    instances.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    instances.pred_classes = torch.tensor([label for _, label in objects], dtype=torch.int64)
    return instances


def test_order_does_not_matter():
    tracker = Tracker()
    assert tracker.update(frame((0, 0), (100, 0), (200, 0))) == [0, 1, 2]
    assert tracker.update(frame((205, 0), (5, 0), (105, 0))) == [2, 0, 1]
    assert tracker.update(frame((110, 0), (210, 0), (10, 0))) == [1, 2, 0]


@pytest.mark.parametrize("hidden", [(), (9, 10, 11)], ids=["both seen", "one hides the other"])
def test_objects_that_cross(hidden):
    tracker = Tracker()
    for step in range(21):  # they are at the same place in step 10
        right, left = (8.0 * step, 0), (160 - 8.0 * step, 0)
        if step in hidden:
            assert tracker.update(frame(right))[0] in (0, 1)
        elif step % 2:
            assert tracker.update(frame(left, right)) == [1, 0]
        else:
            assert tracker.update(frame(right, left)) == [0, 1]


def test_classes_are_kept_apart():
    tracker = Tracker()
    assert tracker.update(frame((0, 0), (0, 1))) == [0, 1]
    assert tracker.update(frame((0, 1), (0, 0))) == [1, 0]
    assert tracker.update(frame((0, 2))) == [2]


def test_missed_objects_come_back_where_they_would_be():
    tracker = Tracker(patience=3)
    for step in range(5):
        assert tracker.update(frame((10.0 * step, 0), (300, 0))) == [0, 1]
    for _ in range(3):
        assert tracker.update(frame((300, 0))) == [1]
    assert tracker.update(frame((300, 0), (80, 0))) == [1, 0]


def test_numbers_of_gone_objects_are_given_away():
    tracker = Tracker(patience=2)
    assert tracker.update(frame((0, 0), (100, 0))) == [0, 1]
    for _ in range(2):
        assert tracker.update(frame((100, 0), (300, 0))) == [1, 2]  # 0 is still remembered
    assert tracker.update(frame((100, 0), (300, 0))) == [1, 2]
    assert tracker.update(frame((0, 0), (100, 0), (300, 0))) == [0, 1, 2]


def test_empty_frames():
    tracker = Tracker()
    assert tracker.update(frame()) == []
    assert tracker.update(frame((0, 0))) == [0]
    assert tracker.update(frame()) == []
    assert tracker.update(frame((0, 0))) == [0]

import pytest
import torch
from detectron2.utils.events import EventStorage
from tiny_model import make_input, tiny_model

from lsnet_d2.modeling.branches import ExtremeBranch
from lsnet_d2.modeling.criterion import Criterion
from lsnet_d2.modeling.landmarks import LandmarkTargets
from lsnet_d2.modeling.points import make_anchor_points
from lsnet_d2.modeling.samples import BranchSamples, Matches
from lsnet_d2.modeling.vectors import encode_vectors


def box_landmarks(boxes):
    """(G, 4, 2): the corners that a box's sides begin with, as extreme points of the boxes."""
    x1, y1, x2, y2 = torch.tensor(boxes).unbind(1)
    return torch.stack([x1, y1, x1, y1, x2, y2, x2, y2], dim=1).view(-1, 4, 2)


def test_overlaps_are_those_of_the_predicted_boxes_with_their_objects():
    points = make_anchor_points([(4, 4)], [8], torch.device("cpu"))
    branch = ExtremeBranch()
    true = box_landmarks([[0.0, 0, 10, 10], [8, 8, 24, 24]])
    # found: the left half of the first, the second as it is, and beside it
    found = box_landmarks([[0.0, 0, 5, 10], [8, 8, 24, 24], [24, 8, 40, 24]])
    positives = Matches(
        image=torch.tensor([0, 1, 1]), point=torch.tensor([5, 6, 9]), object=torch.tensor([0, 1, 1])
    )
    ends = torch.cat([found, torch.zeros(3, 1, 2)], dim=1)
    vectors = encode_vectors(ends - points.xy[positives.point][:, None], branch.alpha) / 8
    targets = LandmarkTargets.make(true, branch.boxes(true))
    samples = BranchSamples(branch, vectors, positives, targets, torch.tensor(1.0))
    overlaps = Criterion.overlaps(points, samples, torch.zeros(2, 16, dtype=torch.int64))
    expected = torch.zeros(2, 16)
    expected[0, 5], expected[1, 6] = 0.5, 1.0
    torch.testing.assert_close(overlaps, expected)


@pytest.mark.parametrize("soft", [False, True])
def test_classes_are_learned_from_what_their_boxes_overlap(soft):
    """Least is lost where the score of the object's class is the overlap, or 1."""
    criterion = tiny_model(CLS_SOFT_LABELS=soft).criterion
    assigned = torch.tensor([[-1, 0, 1]])
    overlaps = torch.tensor([[0.0, 0.25, 0.75]]) if soft else None
    best = torch.zeros(1, 3, 3)
    best[0, 1, 2], best[0, 2, 0] = (0.25, 0.75) if soft else (1.0, 1.0)

    def loss(scores):
        counted = torch.ones(1, 3, dtype=torch.bool)
        logits = scores.clamp(1e-6, 1 - 1e-6).logit()
        classes = [torch.tensor([2, 0])]
        return criterion.classification_loss(logits, assigned, classes, counted, overlaps).item()

    least = loss(best)
    assert least < 1e-6
    for point in range(3):
        for number in range(3):
            for change in (-0.1, 0.1):
                other = best.clone()
                other[0, point, number] += change
                if 0 <= other[0, point, number] <= 1:
                    assert loss(other) > least + 1e-4


def test_soft_labels_change_the_loss_of_classes_alone():
    inputs = [make_input([[10, 12, 60, 70]], [0])]
    losses = []
    for soft in (False, True):
        with EventStorage():
            losses.append(tiny_model(CLS_SOFT_LABELS=soft).train()(inputs))
    hard, soft = losses
    assert {name for name in hard if hard[name] != soft[name]} == {"loss_cls"}
    soft["loss_cls"].backward()

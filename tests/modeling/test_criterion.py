import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lsnet_d2.modeling.branches import ExtremeBranch
from lsnet_d2.modeling.criterion import BranchSamples, Criterion, Positives, few_of_each
from lsnet_d2.modeling.landmarks import LandmarkTargets
from lsnet_d2.modeling.points import make_anchor_points
from lsnet_d2.modeling.vectors import encode_vectors


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 9))
def test_few_of_each_value(values, count):
    values = torch.tensor(values, dtype=torch.int64)
    kept = few_of_each(values, count)
    assert len(set(kept.tolist())) == len(kept)
    for value in values.unique():
        assert (values[kept] == value).sum() == min((values == value).sum(), count)


def test_few_of_each_value_at_random():
    torch.manual_seed(0)
    values = torch.tensor([7, 3, 7, 7, 3, 7])
    chosen = torch.stack([few_of_each(values, 1).sort().values for _ in range(1000)])
    counts = torch.bincount(chosen.flatten(), minlength=6)
    assert (counts[values == 7] - 250).abs().max() < 60
    assert (counts[values == 3] - 500).abs().max() < 70


def test_thinned_samples_stay_together():
    objects = torch.tensor([0, 0, 2, 0, 2, 1])
    places = torch.arange(6)
    samples = BranchSamples(
        branch=ExtremeBranch(),
        vectors=places[:, None, None].expand(6, 5, 4),
        positives=Positives(image=places + 10, point=places + 20, object=objects),
        targets=None,
        normalizer=torch.tensor(6.0),
    )
    few = Criterion.thinned(samples, 2)
    kept = few.vectors[:, 0, 0]
    assert torch.equal(few.positives.image, kept + 10)
    assert torch.equal(few.positives.point, kept + 20)
    assert few.positives.object.sort().values.tolist() == [0, 0, 1, 2, 2]
    assert few.normalizer == 5


def test_losses_of_the_third_stage():
    """Of two positives the second step puts one right; it is not sure of either."""
    branch = ExtremeBranch(polish_weight=3.0)
    points = make_anchor_points([(8, 8)], [8], torch.device("cpu"))
    point = torch.tensor([9, 12])
    landmarks = torch.tensor([[[10.0, 0.0], [0.0, 20.0], [20.0, 40.0], [30.0, 10.0]]])
    start = landmarks + torch.tensor([0.0, 5.0])
    ends = torch.cat([start, torch.zeros(1, 1, 2)], dim=1)
    samples = BranchSamples(
        branch=branch,
        vectors=encode_vectors(ends - points.xy[point][:, None], branch.alpha) / 8,
        positives=Positives(image=torch.zeros(2).long(), point=point, object=torch.zeros(2).long()),
        targets=LandmarkTargets.make(landmarks, branch.boxes(landmarks)),
        normalizer=torch.tensor(2.0),
    )

    def polish(fine, image, found):
        torch.testing.assert_close(found, start.expand(2, 4, 2))
        return [(found, torch.zeros(2)), (torch.cat([landmarks, found[1:]]), torch.zeros(2))]

    criterion = Criterion(
        branches=[branch], strides=[8], padding_divisor=8, num_classes=1, quality_loss_weight=2.0
    )
    losses = criterion.polish_losses(points, samples, polish, [])
    # 5 pixels are a unit: top and bottom are off across their sides, left and right along them
    wrong = (1 + 1 + 0.25 + 0.25) / 4
    mean_of_steps = (2 * wrong + wrong) / 2
    assert losses["loss_bbox_polish"].item() == pytest.approx(3 * mean_of_steps / 2)
    # a logit of 0 loses ln 2, whatever the quality is
    assert losses["loss_bbox_quality"].item() == pytest.approx(2 * math.log(2))

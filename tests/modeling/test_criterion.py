import torch
from hypothesis import given
from hypothesis import strategies as st

from lsnet_d2.modeling.criterion import BranchSamples, Criterion, Positives, few_of_each
from lsnet_d2.modeling.landmarks import ExtremeBranch


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

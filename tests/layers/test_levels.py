import torch

from lsnet_d2.layers.levels import (
    expand_levels,
    flatten_levels,
    kept_by_size,
    unflatten_levels,
)

SIZES = [(2, 3), (1, 2)]


def test_points_are_level_by_level_and_row_by_row():
    maps = [torch.arange(12.0).view(1, 2, 2, 3), 100 + torch.arange(4.0).view(1, 2, 1, 2)]
    flat = flatten_levels(maps)
    first = [[0, 6], [1, 7], [2, 8], [3, 9], [4, 10], [5, 11]]
    assert flat.tolist() == [[*first, [100, 102], [101, 103]]]
    for there, back in zip(maps, unflatten_levels(flat, SIZES), strict=True):
        assert torch.equal(there, back)
        assert back.is_contiguous(memory_format=torch.channels_last)


def test_what_holds_for_a_level_holds_for_its_points():
    assert expand_levels(torch.tensor([8, 16]), SIZES).tolist() == [8] * 6 + [16] * 2
    pairs = expand_levels(torch.tensor([[1, 2], [3, 4]]), SIZES)
    assert pairs.tolist() == [[1, 2]] * 6 + [[3, 4]] * 2


def test_what_follows_from_sizes_is_made_once_and_not_kept_for_ever():
    calls = []

    @kept_by_size
    def made(sizes):
        calls.append(sizes)
        return torch.ones(len(sizes))

    with torch.inference_mode():
        found = made(tuple(SIZES))
    assert made(tuple(SIZES)) is found and len(calls) == 1
    weight = torch.ones(2, requires_grad=True)
    (weight * found).sum().backward()  # not a tensor of inference, which would refuse
    for height in range(20):
        made(((height, 1),))
    assert made(tuple(SIZES)) is not found

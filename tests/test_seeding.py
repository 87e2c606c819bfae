# ruff: noqa: NPY002  (the global generators are what is tested)

import random

import numpy as np
import torch

from lsnet_d2.seeding import seed_by, seeded_by


def draw(device=None):
    return [
        torch.rand((), device=device).item(),
        torch.rand(()).item(),
        np.random.uniform(),
        random.random(),
    ]


def test_numbers_depend_on_the_key_alone():
    found = {}
    for key in ((0, 1), (0, 2), (1, 0), (0, 1)):
        seed_by(*key)
        numbers = draw()
        assert found.setdefault(key, numbers) == numbers
    assert len({number for numbers in found.values() for number in numbers}) == 12


def test_a_block_leaves_no_trace(device):
    """On a GPU, its generator too."""
    seed_by(5)
    whole = [draw(device), draw(device)]
    seed_by(5)
    found = [draw(device)]
    with seeded_by(0, 1, device=device):
        inside = draw(device)
    found.append(draw(device))
    assert found == whole
    with seeded_by(0, 1, device=device):
        assert draw(device) == inside

"""Random numbers that depend on what they are for, and not on what was drawn before."""
# ruff: noqa: NPY002  (Detectron2's augmentations draw from numpy's global generator)

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

# What random numbers are for: the second part of their key, after the seed.
ORDER, AUGMENTATION, STEP, VALIDATION = range(1, 5)


def seed_by(*key: int) -> None:
    """Seed the global generators of torch (of all devices), numpy and Python.

    Args:
        key: integers from 0, such as a seed, what the numbers are for, and an iteration. Different
            keys give independent streams.
    """
    low, high, for_numpy, for_python = np.random.SeedSequence(key).generate_state(4).tolist()
    torch.manual_seed(low | (high & 0x7FFFFFFF) << 32)
    np.random.seed(for_numpy)
    random.seed(for_python)


@contextmanager
def seeded_by(*key: int) -> Iterator[None]:
    """Within the block the global generators of the CPU are seeded; after it they go on as before.

    Args:
        key: as of :func:`seed_by`. Generators of other devices are left alone.
    """
    states = torch.get_rng_state(), np.random.get_state(legacy=False), random.getstate()
    low, high, for_numpy, for_python = np.random.SeedSequence(key).generate_state(4).tolist()
    torch.default_generator.manual_seed(low | (high & 0x7FFFFFFF) << 32)
    np.random.seed(for_numpy)
    random.seed(for_python)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def with_seed(cfg: CfgNode) -> CfgNode:
    """The config with a seed, drawn where it has none; the same in all processes."""
    if cfg.SEED >= 0:
        return cfg
    frozen, cfg = cfg.is_frozen(), cfg.clone()
    cfg.defrost()
    cfg.SEED = comm.shared_random_seed()
    if frozen:
        cfg.freeze()
    return cfg

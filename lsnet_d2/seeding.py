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
    torch.manual_seed(_seed_others(key))


@contextmanager
def seeded_by(*key: int, device: torch.device | None = None) -> Iterator[None]:
    """Within the block global generators are seeded; after it they go on as before.

    Args:
        key: as of :func:`seed_by`.
        device: a GPU whose generator is meant besides those of the CPU. Those of others are left
            alone; workers that load data cannot touch them.
    """
    gpus = [device] if device is not None and device.type == "cuda" else []
    states = np.random.get_state(legacy=False), random.getstate()
    with torch.random.fork_rng(gpus, device_type="cuda"):
        seed = _seed_others(key)
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        try:
            yield
        finally:
            np.random.set_state(states[0])
            random.setstate(states[1])


def _seed_others(key: tuple[int, ...]) -> int:
    """Seed the generators of numpy and Python; returns the seed for torch."""
    low, high, for_numpy, for_python = np.random.SeedSequence(key).generate_state(4).tolist()
    np.random.seed(for_numpy)
    random.seed(for_python)
    return low | (high & 0x7FFFFFFF) << 32


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

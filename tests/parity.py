"""Numbers recorded from the released code; `data/parity/README.md` says what they are."""

import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch

DIRECTORY = Path(__file__).parent / "data" / "parity"
sys.path.insert(0, str(DIRECTORY))

from golden_weight import golden_weight  # noqa: E402, F401


class Recorded:
    """Arrays of one file as tensors, optionally under a common prefix of their keys."""

    def __init__(self, file: str, prefix: str = "") -> None:
        self._arrays = _load(file)
        self._prefix = prefix

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(np.array(self._arrays[self._prefix + key]))

    def __contains__(self, key: str) -> bool:
        return self._prefix + key in self._arrays

    def __iter__(self):
        return (k.removeprefix(self._prefix) for k in self._arrays if k.startswith(self._prefix))

    def under(self, prefix: str) -> "Recorded":
        recorded = object.__new__(Recorded)
        recorded._arrays, recorded._prefix = self._arrays, f"{self._prefix}{prefix}."
        return recorded


@cache
def _load(file: str) -> dict[str, np.ndarray]:
    with np.load(DIRECTORY / file) as arrays:
        return dict(arrays)


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference, relative to the largest absolute expected value."""
    actual, expected = actual.detach().double(), expected.double()
    if expected.numel() == 0:
        assert actual.shape == expected.shape, (actual.shape, expected.shape)
        return 0.0
    scale = expected.abs().max().clamp(min=1e-12)
    return ((actual - expected).abs().max() / scale).item()

"""Numbers recorded from the released code; `data/parity/README.md` says what they are.

Tests compare with them through the fixture `parity`, so that `pytest --parity-report` can say how
close they are.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

DIRECTORY = Path(__file__).parent / "data" / "parity"
sys.path.insert(0, str(DIRECTORY))

from golden_weight import golden_weight  # noqa: E402, F401

# The shipped config of each recorded model
CONFIG_FILES = {
    "bbox_r50": "bbox/lsnet_R_50_FPN_1x.yaml",
    "segm_r50": "segm/lsnet_R_50_FPN_1x.yaml",
    "pose_bbox_r50": "pose/lsnet_bbox_R_50_FPN_1x.yaml",
    "pose_kbox_r50": "pose/lsnet_kbox_R_50_FPN_1x.yaml",
    "bbox_cpv_r50": "bbox/lsnet_cpv_R_50_FPN_1x.yaml",
    "bbox_x101_dcn": "bbox/lsnet_X_101_64x4d_DCN_FPN_ms_2x.yaml",
    "bbox_cpv_r2101_dcn": "bbox/lsnet_cpv_R2_101_DCN_FPN_ms_2x.yaml",
}


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
    actual, expected = actual.detach().cpu().double(), expected.double()
    if expected.numel() == 0:
        assert actual.shape == expected.shape, (actual.shape, expected.shape)
        return 0.0
    scale = expected.abs().max().clamp(min=1e-12)
    return ((actual - expected).abs().max() / scale).item()


@dataclass
class Finding:
    """The largest difference of one comparison.

    `case` names the model, or is None for a component; `file` and `line` are those of the test.
    """

    quantity: str
    unit: str
    within: float
    difference: float
    numbers: int
    case: str | None
    file: str
    line: int


@dataclass
class Parity:
    """Comparisons of one test with recorded numbers, each asserted and noted for the report.

    A comparison takes tensors, arrays, lists or numbers of one shape. `quantity` is the row of the
    report, `about` says more if the comparison fails.
    """

    note: Callable[[Finding], None]
    file: str
    line: int
    case: str | None = None

    def equal(self, quantity, actual, expected, about="") -> None:
        """Each entry is that of the recording."""
        actual, expected = _arrays(actual, expected)
        self.check(quantity, (actual != expected).sum(), 0, expected.size, "that differ", about)

    def absolute(self, quantity, actual, expected, within, unit="absolute", about="") -> None:
        """The largest difference."""
        actual, expected = _arrays(actual, expected)
        difference = np.abs(actual - expected).max(initial=0)
        self.check(quantity, difference, within, expected.size, unit, about)

    def relative(self, quantity, actual, expected, within, least=1e-300, about="") -> None:
        """The largest difference relative to its own value, or to `least` for smaller values."""
        actual, expected = _arrays(actual, expected)
        difference = np.abs(actual - expected) / np.abs(expected).clip(least)
        self.check(
            quantity, difference.max(initial=0), within, expected.size, "of the value", about
        )

    def to_largest(self, quantity, actual, expected, within, about="") -> None:
        """The largest difference relative to the largest value."""
        assert actual.shape == expected.shape, (quantity, actual.shape, expected.shape)
        difference = relative_difference(actual, expected)
        self.check(quantity, difference, within, expected.numel(), "of the largest", about)

    def check(self, quantity, difference, within, numbers, unit, about="") -> None:
        """A difference found elsewhere, in any unit, among so many numbers."""
        difference = float(difference)
        what = f"{quantity} ({about})" if about else quantity
        assert difference <= within, f"{what}: {difference} {unit}, limit {within}"
        found = quantity, unit, within, difference, numbers
        self.note(Finding(*found, self.case, self.file, self.line))


def _arrays(*values) -> list[np.ndarray]:
    """In double precision where they are numbers."""
    arrays = [
        v.detach().cpu().numpy() if isinstance(v, torch.Tensor) else np.asarray(v) for v in values
    ]
    assert len({a.shape for a in arrays}) == 1, [a.shape for a in arrays]
    return [a.astype(np.float64) if a.dtype.kind == "f" else a for a in arrays]

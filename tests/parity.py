"""Numbers recorded from the released code; `data/parity/README.md` says what they are.

Comparisons with them go through :func:`assert_within` and :func:`compare`, which note the largest
difference of each quantity. `pytest --parity-report docs/parity.md` writes them into that page.
"""

import sys
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


@dataclass
class Noted:
    """What was found for one quantity of one model; of a component, the model is ""."""

    difference: float
    tolerance: float


# By quantity and model, in the order of the tests.
NOTED: dict[str, dict[str, Noted]] = {}


def assert_within(
    difference: float, tolerance: float, quantity: str, model: str = "", detail: str = ""
) -> None:
    """Assert that a difference from the released code is at most the tolerance, and note it."""
    noted = NOTED.setdefault(quantity, {}).setdefault(model, Noted(0.0, tolerance))
    noted.difference = max(noted.difference, difference)
    noted.tolerance = max(noted.tolerance, tolerance)
    assert difference <= tolerance, f"{quantity} {model} {detail}: {difference} > {tolerance}"


def compare(
    actual: torch.Tensor, expected: torch.Tensor, tolerance: float, quantity: str, model: str = ""
) -> None:
    """Assert that no value differs by more than the tolerance; 0: all are equal."""
    actual, expected = (torch.as_tensor(x).detach().double() for x in (actual, expected))
    assert actual.shape == expected.shape, (quantity, actual.shape, expected.shape)
    largest = (actual - expected).abs().max().item() if actual.numel() else 0.0
    assert_within(largest, tolerance, quantity, model)


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference, relative to the largest absolute expected value."""
    actual, expected = actual.detach().double(), expected.double()
    if expected.numel() == 0:
        assert actual.shape == expected.shape, (actual.shape, expected.shape)
        return 0.0
    scale = expected.abs().max().clamp(min=1e-12)
    return ((actual - expected).abs().max() / scale).item()


def write_report(page: Path) -> None:
    """Write the noted differences into a page: between the lines `<!-- models -->` and
    `<!-- /models -->` one column for each model, between those of `components` a row each.

    Raises:
        ValueError: the page lacks such lines.
    """
    models = dict.fromkeys(model for row in NOTED.values() for model in row if model)
    tables = {
        "models": [
            f"| | tolerance | {' | '.join(models)} |",
            f"| --- | --- |{' --- |' * len(models)}",
        ],
        "components": ["| | tolerance | largest difference |", "| --- | --- | --- |"],
    }
    for quantity, row in NOTED.items():
        tolerance = _figure(min(noted.tolerance for noted in row.values()))
        if "" in row:
            cells = [quantity, tolerance, _figure(row[""].difference)]
            tables["components"].append(f"| {' | '.join(cells)} |")
        else:
            cells = [_figure(row[model].difference) if model in row else "" for model in models]
            tables["models"].append(f"| {' | '.join([quantity, tolerance, *cells])} |")
    text = page.read_text(encoding="utf-8")
    for name, lines in tables.items():
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if not end:
            raise ValueError(f"{page} has no lines <!-- {name} --> and <!-- /{name} -->")
        text = "".join([before, start, "\n", "\n".join(lines), "\n\n", end, after])
    page.write_text(text, encoding="utf-8")


def _figure(value: float) -> str:
    return f"{value:.1e}".replace("e-0", "e-") if value else "exact"

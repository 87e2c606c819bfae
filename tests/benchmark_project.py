"""The modules of projects/benchmark, which are scripts beside one another and no package."""

import importlib
import importlib.util

import pytest
from tiny_coco import ROOT

FOLDER = ROOT / "projects" / "benchmark"

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(FOLDER))
    straight_port, detectors, inputs, gauges, data_side, measure = (
        importlib.import_module(name)
        for name in ("straight_port", "detectors", "inputs", "gauges", "data_side", "measure")
    )

spec = importlib.util.spec_from_file_location("benchmark_tool", ROOT / "tools" / "benchmark.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

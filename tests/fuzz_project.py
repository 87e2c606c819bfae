"""The modules of projects/fuzz, which are scripts beside one another and no package."""

import importlib

import pytest
from tiny_coco import ROOT

FOLDER = ROOT / "projects" / "fuzz"

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(FOLDER))
    images, annotations, fuzz_inputs = (
        importlib.import_module(name) for name in ("images", "annotations", "fuzz_inputs")
    )

"""The modules of projects/recipes, which are scripts beside one another and no package."""

import importlib

import pytest
from tiny_coco import ROOT

FOLDER = ROOT / "projects" / "recipes"

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(FOLDER))
    # "train" and the like are common names: none is left behind for other tests
    compare, curves, folders, pictures, plan, report, runs, train, versions = (
        importlib.import_module(name)
        for name in (
            *("compare", "curves", "folders", "pictures", "plan", "report", "runs"),
            *("train", "versions"),
        )
    )

import numpy as np
import pytest
from benchmark_project import data_side, inputs
from pycocotools import mask as mask_util

from lsnet_d2.data.polygons import polygons_to_rle


def test_figures(monkeypatch):
    monkeypatch.setattr(data_side, "MAPPED_IMAGES", 1)
    monkeypatch.setattr(data_side, "EVALUATED_IMAGES", 30)
    figures = data_side.data(1)
    # fmt: off
    assert list(figures) == [
        "rle", "bitmaps", "mask_mapper", "mapper_bbox", "mapper_segm",
        "targets_10", "targets_memory", "targets_1000", "evaluation", "pycocotools",
    ]
    # fmt: on
    assert min(figures.values()) > 0
    # of 1,000 objects; times of a busy machine are no test
    assert figures["targets_memory"] < 250e6


def test_both_ways_to_rles_give_the_same_masks():
    contours = inputs.ellipses(np.random.default_rng(0), 20, 480, 640)
    ours = polygons_to_rle(contours, 480, 640)
    drawn = data_side.bitmaps_to_rle(contours, 480, 640)
    # OpenCV draws the outline, too
    ious = [mask_util.iou([a], [b], [0]).item() for a, b in zip(ours, drawn, strict=True)]
    assert min(ious) > 0.8
    assert all(isinstance(rle["counts"], str) for rle in drawn)


def test_figures_that_differ_are_an_error(monkeypatch):
    class Wrong(data_side.FastCOCOeval):
        def summarize(self):
            super().summarize()
            self.stats = self.stats + 1e-9

    monkeypatch.setattr(data_side, "FastCOCOeval", Wrong)
    with pytest.raises(ArithmeticError, match="bbox"):
        data_side.evaluation(5)

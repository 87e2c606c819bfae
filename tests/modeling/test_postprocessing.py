import math

import pytest
import torch
from parity import Recorded

from lsnet_d2.modeling.branches import ExtremeBranch
from lsnet_d2.modeling.postprocessing import (
    make_instances,
    overlap_decay,
    rescale_instances,
    select_detections,
    top_points,
)


@pytest.mark.parametrize("case", ["n0", "n1", "n2", "n3"])
def test_nms_is_that_of_the_released_code(parity, case):
    recorded = Recorded("comp_nms.npz", f"{case}.")
    point, classes, scores = select_detections(
        recorded["boxes"],
        recorded["scores"][:, :-1],  # the last column is a dummy background
        score_thresh=recorded["score_thr"].item(),
        nms_thresh=0.6,
        max_detections=recorded["max_per_img"].item(),
    )
    boxes = torch.cat([recorded["boxes"][point], scores[:, None]], dim=1)
    parity.absolute("NMS, boxes and scores", boxes, recorded["out_dets"], within=1e-5)
    parity.equal("NMS, landmarks", recorded["vectors"][point], recorded["out_vectors"])
    parity.equal("NMS, classes", classes, recorded["out_labels"])


def test_one_point_can_be_of_two_classes():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    point, classes, scores = select_detections(
        boxes, torch.tensor([[0.3, 0.6]]), score_thresh=0.1, nms_thresh=0.5, max_detections=9
    )
    assert point.tolist() == [0, 0] and classes.tolist() == [1, 0]
    assert scores.tolist() == pytest.approx([0.6, 0.3])


class TestOverlapDecay:
    # the second overlaps the first by a half, the third both, most with the second
    BOXES = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 4], [50, 50, 60, 60]])

    def test_by_the_best_detection_that_overlaps_most(self):
        decay = overlap_decay(self.BOXES, torch.zeros(4, dtype=torch.int64), sigma=0.5)
        overlaps = torch.tensor([0.0, 0.5, 0.8, 0.0])
        torch.testing.assert_close(decay, (-(overlaps**2) / 0.5).exp())

    def test_by_those_of_the_same_class(self):
        decay = overlap_decay(self.BOXES, torch.tensor([0, 1, 0, 0]), sigma=1.0)
        overlaps = torch.tensor([0.0, 0.0, 0.4, 0.0])
        torch.testing.assert_close(decay, (-(overlaps**2)).exp())

    def test_boxes_without_an_area_overlap_nothing(self):
        boxes = torch.tensor([[0.0, 0, 10, 10], [40, 5, 40, 9], [40, 5, 40, 9], [0, 0, 10, 10]])
        decay = overlap_decay(boxes, torch.zeros(4, dtype=torch.int64), sigma=1.0)
        assert decay.tolist() == pytest.approx([1, 1, 1, math.exp(-1)])

    def test_of_nothing(self):
        assert overlap_decay(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 1.0).shape == (
            0,
        )


def test_top_points_per_level():
    scores = torch.tensor([[0.1], [0.5], [0.4], [0.9], [0.2]])
    assert top_points(scores, [3, 2], topk=2).tolist() == [1, 2, 3, 4]
    assert top_points(scores, [3, 2], topk=1).tolist() == [1, 3]


def test_rescaling_drops_empty_boxes_and_keeps_fields_together():
    branch = ExtremeBranch()
    boxes = torch.tensor([[10.0, 10.0, 30.0, 40.0], [20.0, 5.0, 20.0, 9.0], [0.0, 0.0, 99.0, 99.0]])
    landmarks = torch.stack(
        [boxes[:, [0, 1]], boxes[:, [0, 3]], boxes[:, [2, 3]], boxes[:, [2, 1]]], 1
    )
    instances = make_instances(
        (50, 60), boxes, torch.tensor([0.9, 0.8, 0.7]), torch.arange(3), [branch], [landmarks]
    )
    assert instances.pred_boxes.tensor[2].tolist() == [0, 0, 60, 50]
    result = rescale_instances(instances, 100, 180, [branch])
    assert result.image_size == (100, 180)
    assert result.pred_classes.tolist() == [0, 2]
    assert result.pred_boxes.tensor.tolist() == [[30, 20, 90, 80], [0, 0, 180, 100]]
    assert result.pred_extreme_points[0].tolist() == [[30, 20], [30, 80], [90, 80], [90, 20]]

import pytest
import torch
from fvcore.nn import sigmoid_focal_loss
from parity import Recorded

from lsnet_d2.modeling.losses import (
    box_penalty,
    cross_iou,
    cross_iou_grouped,
    cross_iou_per_coordinate,
    gaussian_focal_loss,
    quality_focal_loss,
)
from lsnet_d2.modeling.vectors import decode_vectors


def extreme_loss(pred, target, boxes, gt_boxes, visible):
    overlap = cross_iou(pred, target)
    return 1 - overlap + box_penalty(boxes, gt_boxes, overlap)


def contour_loss(pred, target, boxes, gt_boxes, visible):
    overlap = cross_iou_grouped(pred, target, num_groups=9)
    return 1 - overlap + box_penalty(boxes, gt_boxes, overlap)


def keypoint_loss(pred, target, boxes, gt_boxes, visible):
    return 1 - cross_iou_per_coordinate(pred, target, visible)


def extreme_boxes(points):
    return torch.stack([points[:, 1, 0], points[:, 0, 1], points[:, 3, 0], points[:, 2, 1]], 1)


def spanned_boxes(points):
    return torch.cat([points.amin(1), points.amax(1)], dim=1)


KINDS = {
    "bbox": (extreme_loss, extreme_boxes),
    "polygon": (contour_loss, spanned_boxes),
    "keypoint": (keypoint_loss, spanned_boxes),
}


def recorded_case(kind):
    recorded = Recorded(f"comp_cross_iou_{kind}.npz")
    unit = recorded["normalize_term"][:, None]
    pred = recorded["pred"].view(len(unit), -1, 4).requires_grad_()
    target = recorded["target_after_alpha"].view(len(unit), -1, 4)
    origin = recorded["anchor_pts"][:, None, :2] / unit[:, None]
    visible = recorded["vs"] > 0 if "vs" in recorded else None
    loss_function, make_boxes = KINDS[kind]

    def loss_of(vectors):
        boxes = make_boxes(decode_vectors(vectors[:, :-1]) + origin)
        return loss_function(vectors, target, boxes, recorded["gt_boxes"] / unit, visible)

    return recorded, pred, target, loss_of


@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_are_those_of_the_released_code(parity, kind):
    recorded, pred, _, loss_of = recorded_case(kind)
    loss = loss_of(pred)
    parity.to_largest(f"cross-IOU loss, {kind}", loss, recorded["loss_elem"], within=1e-5)
    (gradient,) = torch.autograd.grad(loss.sum(), pred, retain_graph=True)
    gradient, expected = gradient.flatten(1), recorded["grad_pred_sum"]
    parity.to_largest(f"cross-IOU gradient, {kind}", gradient, expected, within=1e-4)

    weighted = 2 * (loss * recorded["weight"]).sum() / 17
    expected = recorded["loss_weighted_w2_avg17"]
    parity.to_largest(f"cross-IOU loss, weighted, {kind}", weighted, expected, within=1e-5)
    (gradient,) = torch.autograd.grad(weighted, pred)
    gradient, expected = gradient.flatten(1), recorded["grad_pred_weighted"]
    parity.to_largest(f"cross-IOU gradient, weighted, {kind}", gradient, expected, within=1e-4)


@pytest.mark.parametrize("kind", ["bbox", "polygon"])
def test_exact_prediction_is_finite_where_the_released_code_gives_nan(kind):
    recorded, _, target, loss_of = recorded_case(kind)
    assert recorded["perfect8_loss"].isnan().any()
    pred = target.clone().requires_grad_()
    loss = loss_of(pred)
    positive = recorded["weight"] > 0
    loss[positive].sum().backward()
    assert loss[positive].isfinite().all()
    assert pred.grad[positive].isfinite().all()


def test_perfect_and_disjoint_predictions():
    target = torch.tensor([[[1.0, 0.2, 0.0, 0.0], [3.0, 0.6, 2.0, 0.4]]])
    assert cross_iou(target, target).item() == pytest.approx(1)
    assert cross_iou(torch.zeros_like(target), target).item() == 0
    # min: 1 + 0.2 + 3 + 0.6 + 2 + 0.4; max: the same plus 1.8 in an unused component
    pred = target.clone()
    pred[0, 0, 2] = 1.8
    assert cross_iou(pred, target).item() == pytest.approx(7.2 / 9.0)


def test_groups_are_interleaved():
    target = torch.ones(1, 4, 4)
    pred = target.clone()
    pred[:, 1::2] = 0.5
    assert cross_iou_grouped(pred, target, num_groups=2).item() == pytest.approx(0.75)


def test_invisible_landmarks_count_as_zero_and_get_no_gradient():
    target = torch.ones(1, 3, 4)
    pred = torch.full((1, 3, 4), 0.5, requires_grad=True)
    overlap = cross_iou_per_coordinate(pred, target, torch.tensor([[True, False]]))
    assert overlap.item() == pytest.approx(0.5 * 2 / 3)
    overlap.sum().backward()
    assert (pred.grad[0, 1] == 0).all() and (pred.grad[0, 0] > 0).all()


def test_box_penalty_by_hand():
    pred = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    shifted = torch.tensor([[1.0, 0.0, 3.0, 2.0]])
    overlap = torch.tensor([0.5])
    # centres 1 apart, enclosing box 3 x 2, equal aspect ratios
    assert box_penalty(pred, shifted, overlap).item() == pytest.approx(1 / 13, rel=1e-5)
    assert box_penalty(pred, pred, torch.ones(1)).item() == 0


def test_no_positive_points():
    none = torch.zeros(0, 5, 4)
    assert cross_iou(none, none).shape == (0,)
    assert cross_iou_grouped(none, none, 2).shape == (0,)
    assert box_penalty(torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0)).shape == (0,)


def test_heat_map_loss_is_that_of_the_released_code(parity):
    recorded = Recorded("comp_losses.npz", "gauss.")
    scores = recorded["pred_prob"].double()
    logits = scores.logit().requires_grad_()
    loss = gaussian_focal_loss(logits, recorded["target"].double())
    loss = 0.25 * (loss * recorded["weight"]).sum() / 15
    loss.backward()
    parity.to_largest("corner heat loss", loss, recorded["loss_w025_avg15"], within=1e-6)
    by_score = logits.grad / (scores * (1 - scores))
    parity.to_largest("corner heat loss, gradient", by_score, recorded["grad"], within=1e-6)


def test_heat_map_loss_is_finite_for_any_logit():
    logits = torch.tensor([-200.0, 200.0] * 2, requires_grad=True)
    loss = gaussian_focal_loss(logits, torch.tensor([1.0, 1.0, 0.0, 0.5]))
    assert loss.tolist() == [200, 0, 0, 200 * 0.5**4]
    loss.sum().backward()
    assert logits.grad.tolist() == [-1, 0, 0, 0.5**4]


def test_quality_focal_loss_by_hand():
    scores = torch.tensor([0.5, 0.2, 0.9, 0.3])
    target = torch.tensor([0.0, 1.0, 0.6, 0.3])
    loss = quality_focal_loss(scores.logit(), target)
    entropy = -(target * scores.log() + (1 - target) * (1 - scores).log())
    expected = torch.tensor([0.25, 0.64, 0.09, 0.0]) * entropy
    torch.testing.assert_close(loss, expected)


def test_quality_focal_loss_is_the_focal_loss_where_targets_are_zero_or_one():
    logits = torch.linspace(-8, 8, 12)
    target = (torch.arange(12) % 2).float()
    expected = sigmoid_focal_loss(logits, target, alpha=-1, gamma=1.5)
    torch.testing.assert_close(quality_focal_loss(logits, target, gamma=1.5), expected)

import json

import pytest
import torch
import torch.nn.functional as F
from detectron2.utils.events import EventStorage
from hypothesis import given
from hypothesis import strategies as st
from parity import DIRECTORY, Recorded
from tiny_model import make_input, tiny_model

from lsnet_d2.layers.levels import flatten_levels
from lsnet_d2.modeling.branches import ExtremeBranch
from lsnet_d2.modeling.corner_verification import (
    OFFSET_BETA,
    CornerCriterion,
    CornerOutput,
    CornerVerification,
    snap_boxes,
)
from lsnet_d2.modeling.head import LSNetHead
from lsnet_d2.modeling.points import make_anchor_points
from lsnet_d2.modeling.postprocessing import clip_boxes

STRIDES = [8, 16, 32, 64, 128]
BOXES = [[10, 12, 60, 70], [70, 20, 120, 90], [30, 40, 44, 60]]
JOINT = {"TASK": "joint", "BRANCHES": ["extreme", "contour", "keypoint"]}
LOSSES = ["loss_heatmap", "loss_offset", "loss_sem"]


def points_of(sizes):
    return make_anchor_points(sizes, STRIDES[: len(sizes)], torch.device("cpu"))


def losses_of(model, inputs):
    with EventStorage():
        return model.train()(inputs)


# ---------------------------------------------------------------------- layers


def test_parameters_of_the_released_head():
    names = json.loads((DIRECTORY / "bbox_cpv_r50.names.json").read_text())["state_dict"]
    shapes = [shape for name, shape in names.items() if name.startswith("bbox_head.")]
    head = LSNetHead(
        in_channels=256,
        num_classes=80,
        branches=[ExtremeBranch()],
        corners=CornerVerification(in_channels=256, num_classes=80),
    )
    expected = sum(torch.Size(shape).numel() for shape in shapes)
    assert sum(p.numel() for p in head.parameters()) == expected


def test_the_plain_head_has_nothing_of_it():
    plain, verified = tiny_model(), tiny_model(CPV=True)
    names = set(plain.state_dict())
    assert not any("corners" in name for name in names)
    assert {name for name in verified.state_dict() if "corners" not in name} == names


def test_scores_start_at_the_prior():
    torch.manual_seed(0)
    features = [torch.randn(2, 64, h, w) for h, w in [(12, 16), (6, 8), (3, 4)]]
    verification = CornerVerification(in_channels=64, num_classes=3, prior_prob=0.02)
    output, context = verification(features)
    assert output.heat.shape == (2, 12 * 16 + 6 * 8 + 12, 2)
    assert output.offsets.shape == (*output.heat.shape, 2)
    assert output.semantic.shape == (*output.heat.shape[:2], 3)
    for logits in (output.heat, output.semantic):
        assert logits.sigmoid().mean().item() == pytest.approx(0.02, rel=0.2)
    joined = context.join(context.add(features))
    assert [f.shape[1] for f in joined] == [70] * 3
    evidence = flatten_levels([f[:, 64:] for f in joined])
    assert torch.equal(evidence, torch.cat([output.heat, output.offsets.flatten(2)], dim=2))


@pytest.mark.parametrize(
    ("lsnet", "message"),
    [
        ({"TASK": "segm"}, r"MODEL\.LSNET\.CPV is True.*MODEL\.LSNET\.TASK 'segm'"),
        ({"TASK": "pose_kbox"}, r"MODEL\.LSNET\.CPV is True.*MODEL\.LSNET\.TASK 'pose_kbox'"),
        ({"POLISH_IN_FEATURES": ["p3"]}, r"MODEL\.LSNET\.CPV.*MODEL\.LSNET\.POLISH_IN_FEATURES"),
        ({"CPV_LOSS_WEIGHTS": [1.0]}, r"MODEL\.LSNET\.CPV_LOSS_WEIGHTS is \[1\.0\].*three"),
    ],
)
def test_what_does_not_go_together_is_refused(lsnet, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(CPV=True, **lsnet)


# ---------------------------------------------------------------------- losses


@pytest.mark.parametrize("lsnet", [{}, {"TASK": "pose_bbox"}, JOINT], ids=["bbox", "pose", "joint"])
@pytest.mark.parametrize("empty", [0, 1, 2])
def test_losses_are_finite_and_reach_all_parameters(lsnet, empty):
    model = tiny_model(CPV=True, **lsnet)
    images = [make_input(BOXES, [0, 1, 2])] * (2 - empty) + [make_input([], [])] * empty
    losses = losses_of(model, images)
    assert set(losses) == {*losses_of(tiny_model(**lsnet), images), *LOSSES}
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["loss_heatmap"] > 0
    assert (losses["loss_offset"] > 0) == (losses["loss_sem"] > 0) == (empty < 2)
    sum(losses.values()).backward()
    # Every worker of a distributed run must have gradients for the same parameters.
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_weights_scale_their_losses():
    inputs = [make_input(BOXES, [0, 1, 2])]
    plain = losses_of(tiny_model(CPV=True), inputs)
    scaled = losses_of(tiny_model(CPV=True, CPV_LOSS_WEIGHTS=[0.5, 3.0, 0.4]), inputs)
    ratios = [(scaled[name] / plain[name]).item() for name in LOSSES]
    assert ratios == pytest.approx([2, 3, 4])


def test_normalizers_are_sums_over_images():
    model = tiny_model(CPV=True)
    once = losses_of(model, [make_input(BOXES, [0, 1, 2])])
    twice = losses_of(model, [make_input(BOXES, [0, 1, 2])] * 2)
    for name in LOSSES:
        assert twice[name].item() == pytest.approx(once[name].item(), rel=1e-5)


def test_ignored_regions_are_no_background():
    image, empty = make_input(BOXES, [0, 1, 2]), make_input([], [])
    everywhere = torch.tensor([[0.0, 0.0, 128.0, 96.0]])
    model = tiny_model(CPV=True)
    assert losses_of(model, [empty])["loss_heatmap"] > 0
    assert losses_of(model, [{**empty, "ignore_boxes": everywhere}])["loss_heatmap"] == 0
    plain = losses_of(model, [image])
    objects_alone = losses_of(model, [{**image, "ignore_boxes": everywhere}])
    assert 0 < objects_alone["loss_heatmap"] < plain["loss_heatmap"]
    assert 0 < objects_alone["loss_sem"] < plain["loss_sem"]
    assert objects_alone["loss_offset"] == plain["loss_offset"]


def test_semantic_loss_is_that_of_the_released_code(parity):
    recorded = Recorded("comp_losses.npz", "sep.")
    logits = recorded["logits"].requires_grad_()
    weights = recorded["target"] * recorded["weight"]
    everywhere = torch.ones_like(weights, dtype=torch.bool)
    criterion = CornerCriterion()
    loss = 0.1 * criterion.semantic_loss(logits, weights, everywhere)
    loss.backward()
    parity.to_largest("semantic loss", loss, recorded["loss_w01"], within=1e-6)
    parity.to_largest("semantic loss, gradient", logits.grad, recorded["grad"], within=1e-5)
    # There the released code has 1 / 0.
    assert recorded["loss_no_positive"] == torch.inf
    assert criterion.semantic_loss(logits, torch.zeros_like(weights), everywhere) == 0


def test_offset_loss_is_that_of_the_released_code(parity):
    recorded = Recorded("comp_losses.npz", "sl1.")
    offsets = recorded["pred"].requires_grad_()
    loss = F.smooth_l1_loss(offsets, recorded["target"], reduction="none", beta=OFFSET_BETA)
    loss = (loss * recorded["weight"]).sum() / 15
    loss.backward()
    parity.to_largest("corner offset loss", loss, recorded["loss_beta19_avg15"], within=1e-6)
    parity.to_largest("corner offset loss, gradient", offsets.grad, recorded["grad"], within=1e-6)


def test_learns_one_image():
    model = tiny_model(CPV=True, TOWER_CONV="conv", NUM_CONVS=1)
    inputs = [make_input(BOXES, [0, 1, 2], seed=3)]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    history = []
    for _ in range(25):
        losses = losses_of(model, inputs)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5)
        optimizer.step()
        history.append(losses)
    for name in LOSSES:
        assert history[-1][name] < 0.7 * history[0][name], name


# ---------------------------------------------------------------------- inference


def test_snapped_boxes_are_those_of_the_released_code(parity):
    recorded = Recorded("comp_cpv.npz")
    points = points_of([tuple(hw) for hw in recorded["level_hw"].tolist()])

    def flat(name):
        return flatten_levels([recorded[f"{name}_{level}"] for level in range(5)])

    offsets = flat("hm_offset").unflatten(2, (2, 2))
    output = CornerOutput(flat("hm_score"), offsets, torch.zeros(1, len(points.xy), 0))[0]
    branch = ExtremeBranch()
    vectors = flat("refine")[0].unflatten(1, (5, 4))
    landmarks = branch.decode(vectors, points.xy, points.strides)
    size = recorded["img_shape"].tolist()
    boxes = clip_boxes(branch.boxes(landmarks), size)
    snapped = clip_boxes(snap_boxes(boxes, points.levels, points, output), size)
    parity.absolute("verified boxes", snapped, recorded["boxes"], within=1e-4, unit="px")
    assert (snapped[points.per_level[0] :] != boxes[points.per_level[0] :]).any()


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=5, max_size=5),
    st.integers(0, 4),
    st.tuples(*[st.floats(0, 60)] * 4),
    st.integers(0, 99),
)
def test_corners_go_to_the_hottest_cell_around(sizes, level, box, seed):
    """For maps of any size, also of one row or column."""
    points = points_of(sizes)
    generator = torch.Generator().manual_seed(seed)
    heat = torch.rand(len(points.xy), 2, generator=generator)
    offsets = torch.rand(len(points.xy), 2, 2, generator=generator)
    output = CornerOutput(heat, offsets, torch.zeros(len(points.xy), 0))
    box = torch.tensor([box])
    snapped = snap_boxes(box, torch.tensor([level]), points, output)
    if level == 0:
        assert torch.equal(snapped, box)
        return
    source = {1: 0, 2: 0, 3: 1, 4: 1}[level]
    height, width = sizes[source]
    stride, first = STRIDES[source], sum(points.per_level[:source])
    for corner, (x, y) in enumerate(box.view(2, 2).tolist()):
        left = max(min(int(x // stride), width - 2), 0)
        top = max(min(int(y // stride), height - 2), 0)
        window = [
            first + row * width + column
            for row in range(top, min(top + 2, height))
            for column in range(left, min(left + 2, width))
        ]
        best = max(window, key=lambda cell: heat[cell, corner].item())
        expected = points.xy[best] + stride * offsets[best, corner]
        torch.testing.assert_close(snapped.view(2, 2)[corner], expected)


def test_no_boxes_are_snapped_to_none():
    points = points_of([(4, 4), (2, 2), (1, 1)])
    output = CornerOutput(torch.zeros(21, 2), torch.zeros(21, 2, 2), torch.zeros(21, 3))
    none = torch.zeros(0, 4)
    assert snap_boxes(none, torch.zeros(0, dtype=torch.int64), points, output).shape == (0, 4)


def test_extreme_points_lie_on_the_sides_of_the_snapped_boxes():
    model = tiny_model(CPV=True, SCORE_THRESH_TEST=0.0, TOPK_CANDIDATES_TEST=50).eval()
    outwards = torch.tensor([[2.0, 0, 0, 1], [0, 0, 2, 0], [0, 2, 0, 0], [0, 0, 0, 2], [0] * 4])
    model.head.branches["bbox"].refine.out.bias.data = outwards.flatten()
    torch.nn.init.normal_(model.head.corners.bottom_right.offset.bias)
    inputs = make_input([], [])
    with torch.no_grad():
        found = model([inputs])[0]["instances"]
        model.head.corners.bottom_right.offset.bias.fill_(5)
        others = model([inputs])[0]["instances"]
    boxes = found.pred_boxes.tensor
    assert len(found) > 0
    assert (
        boxes.shape != others.pred_boxes.tensor.shape or (boxes != others.pred_boxes.tensor).any()
    )
    top, left, bottom, right = found.pred_extreme_points.unbind(1)
    sides = torch.stack([left[:, 0], top[:, 1], right[:, 0], bottom[:, 1]], dim=1)
    torch.testing.assert_close(sides, boxes)
    for points, axis in ((top, 0), (left, 1), (bottom, 0), (right, 1)):
        low, high = boxes[:, axis], boxes[:, axis + 2]
        assert ((points[:, axis] >= low) & (points[:, axis] <= high)).all()

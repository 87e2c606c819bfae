import copy

import pytest
import torch
from detectron2.utils.events import EventStorage
from tiny_model import make_input, tiny_model

from lsnet_d2.modeling.points import make_anchor_points

BOXES = [[10, 12, 60, 70], [70, 20, 120, 90], [30, 40, 44, 60]]
LOSSES = {"loss_cls", "loss_bbox_init", "loss_bbox_refine"}


def losses_of(model, inputs):
    model.train()
    with EventStorage() as storage:
        return model(inputs), storage.latest()


def test_losses_are_finite_and_reach_all_parameters():
    model = tiny_model()
    losses, scalars = losses_of(model, [make_input(BOXES, [0, 1, 2]), make_input(BOXES[:1], [1])])
    assert set(losses) == LOSSES
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert scalars["lsnet/num_pos_init"][0] == 2  # 3 and 1 in two images


@pytest.mark.parametrize("empty", [1, 2])
def test_images_without_objects(empty):
    model = tiny_model()
    inputs = [make_input(BOXES, [0, 1, 2]), make_input([], [])][empty - 1 :]
    losses, _ = losses_of(model, inputs)
    assert all(loss.isfinite() for loss in losses.values())
    if empty == 2:
        assert losses["loss_bbox_init"] == losses["loss_bbox_refine"] == 0
    sum(losses.values()).backward()
    # Every worker of a distributed run must have gradients for the same parameters.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_inputs_are_not_modified():
    inputs = [make_input(BOXES, [0, 1, 2])]
    before = copy.deepcopy(inputs)
    losses_of(tiny_model(), inputs)
    for name, value in before[0]["instances"].get_fields().items():
        after = inputs[0]["instances"].get(name)
        assert torch.equal(getattr(value, "tensor", value), getattr(after, "tensor", after)), name
    assert torch.equal(before[0]["image"], inputs[0]["image"])


def test_loss_of_a_batch_is_the_mean_weighted_by_positives():
    """Normalisers are sums over images, so a repeated image changes nothing."""
    model = tiny_model()
    once, _ = losses_of(model, [make_input(BOXES, [0, 1, 2])])
    twice, _ = losses_of(model, [make_input(BOXES, [0, 1, 2])] * 2)
    for name in LOSSES:
        assert twice[name].item() == pytest.approx(once[name].item(), rel=1e-5)


def test_weights_scale_their_losses():
    plain, _ = losses_of(tiny_model(), [make_input(BOXES, [0, 1, 2])])
    scaled, _ = losses_of(
        tiny_model(INIT_LOSS_WEIGHTS=[3.0], REFINE_LOSS_WEIGHTS=[0.5], CLS_LOSS_WEIGHT=2.0),
        [make_input(BOXES, [0, 1, 2])],
    )
    ratios = {name: (scaled[name] / plain[name]).item() for name in LOSSES}
    assert ratios == pytest.approx({"loss_cls": 2, "loss_bbox_init": 3, "loss_bbox_refine": 0.25})


def test_points_in_crowds_are_no_background():
    inputs = make_input([], [])
    half = {**inputs, "ignore_boxes": torch.tensor([[0.0, 0.0, 64.0, 96.0]])}
    everywhere = {**inputs, "ignore_boxes": torch.tensor([[0.0, 0.0, 128.0, 96.0]])}
    nowhere = {**inputs, "ignore_boxes": torch.zeros(0, 4)}
    model = tiny_model()
    plain = losses_of(model, [inputs])[0]["loss_cls"]
    assert losses_of(model, [nowhere])[0]["loss_cls"] == plain > 0
    assert losses_of(model, [half])[0]["loss_cls"].item() == pytest.approx(plain.item() / 2, 0.05)
    assert losses_of(model, [everywhere])[0]["loss_cls"] == 0
    follows_release = tiny_model(IGNORE_CROWD=False)
    assert losses_of(follows_release, [everywhere])[0]["loss_cls"] == plain


def test_points_on_batch_padding_do_not_count():
    """The loss of a small image must not depend on a larger neighbour's padding."""
    model = tiny_model()
    points = make_anchor_points([(12, 16), (6, 8), (3, 4)], [8, 16, 32], torch.device("cpu"))
    valid = model.valid_points(points, (40, 70))  # padded to 64 x 96
    finest = valid[: 12 * 16].view(12, 16)
    assert finest[:8, :12].all() and finest.sum() == 8 * 12
    assert valid[-12:].view(3, 4).sum() == 2 * 3


def test_inference_returns_what_detectron2_expects():
    model = tiny_model(SCORE_THRESH_TEST=0.0, TOPK_CANDIDATES_TEST=50).eval()
    inputs = make_input(BOXES, [0, 1, 2])
    inputs.update(height=192, width=256)
    outwards = torch.tensor([[2, 0, 0, 0], [0, 0, 2, 0], [0, 2, 0, 0], [0, 0, 0, 2], [0, 0, 0, 0]])
    model.head.branches["bbox"].refine.out.bias.data = outwards.float().flatten()
    with torch.no_grad():
        (output,) = model([inputs])
    instances = output["instances"]
    assert instances.image_size == (192, 256)
    assert 0 < len(instances) <= 100
    assert set(instances.get_fields()) == {
        "pred_boxes", "scores", "pred_classes", "pred_extreme_points"
    }  # fmt: skip
    boxes = instances.pred_boxes.tensor
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert (boxes >= 0).all() and (boxes[:, 2] <= 256).all() and (boxes[:, 3] <= 192).all()
    top, left, bottom, right = instances.pred_extreme_points.unbind(1)
    sides = torch.stack([left[:, 0], top[:, 1], right[:, 0], bottom[:, 1]], dim=1)
    torch.testing.assert_close(sides, boxes)
    assert (instances.scores.diff() <= 0).all()


def test_learns_one_image():
    """Forty steps on one image find its objects."""
    model = tiny_model(TOWER_CONV="conv", NUM_CONVS=1)
    inputs = [make_input(BOXES, [0, 1, 2], seed=3)]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        losses, _ = losses_of(model, inputs)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        found = model(inputs)[0]["instances"][:3]
    assert sorted(found.pred_classes.tolist()) == [0, 1, 2]
    order = found.pred_classes.argsort()
    assert (found.pred_boxes.tensor[order] - torch.tensor(BOXES)).abs().max() < 6
    assert found.scores.min() > 0.3

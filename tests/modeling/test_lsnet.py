import copy

import pytest
import torch
from detectron2.modeling import build_backbone, build_model
from detectron2.utils.events import EventStorage
from tiny_model import make_input, tiny_model

from lsnet_d2.config_file import load_config
from lsnet_d2.modeling.lsnet import LSNet
from lsnet_d2.modeling.points import make_anchor_points

BOXES = [[10, 12, 60, 70], [70, 20, 120, 90], [30, 40, 44, 60]]
# Vectors to top, left, bottom, right and centre that span a box.
OUTWARDS = torch.tensor([[2.0, 0, 0, 0], [0, 0, 2, 0], [0, 2, 0, 0], [0, 0, 0, 2], [0, 0, 0, 0]])
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


def test_the_third_stage_is_not_asked_about_nothing(monkeypatch):
    """On CUDA, attention of nothing is an error."""
    model = tiny_model(POLISH_IN_FEATURES=["p3"], SCORE_THRESH_TEST=0.999).eval()

    def asked(*_args, **_kwargs):
        raise AssertionError("it was asked")

    monkeypatch.setattr(model.polish, "forward", asked)
    with torch.no_grad():
        (output,) = model([make_input(BOXES, [0, 1, 2])])
        assert len(output["instances"]) == 0
        assert output["instances"].pred_extreme_points.shape == (0, 4, 2)
        model.test_score_thresh = 0.0
        with pytest.raises(AssertionError, match="it was asked"):
            model([make_input(BOXES, [0, 1, 2])])


def test_vectors_are_not_rounded_by_autocast():
    """Of 8 bits many boxes would have no width at all, and huge gradients."""
    model = tiny_model(TOWER_CONV="conv", REFINE_SAMPLING=False).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        _, predictions, _ = model.predict(torch.rand(1, 3, 384, 384))
    for vectors in (*predictions.init, *predictions.refine):
        assert vectors.dtype is torch.float32
    components = predictions.init[0][0].flatten(1)  # (A, 20)
    same = components[:, None] == components[:, :, None]
    assert same.float().mean() < 0.06  # the diagonal is 0.05


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
    valid = model.criterion.valid_points(points, (40, 70))  # padded to 64 x 96
    finest = valid[: 12 * 16].view(12, 16)
    assert finest[:8, :12].all() and finest.sum() == 8 * 12
    assert valid[-12:].view(3, 4).sum() == 2 * 3


JOINT = {"TASK": "joint", "BRANCHES": ["extreme", "contour", "keypoint"]}
TASKS = {
    "segm": {"TASK": "segm"},
    "pose_bbox": {"TASK": "pose_bbox"},
    "pose_kbox": {"TASK": "pose_kbox"},
    "joint": JOINT,
}


@pytest.mark.parametrize("lsnet", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("empty", [False, True])
def test_losses_of_every_task_are_finite_and_reach_all_parameters(lsnet, empty):
    model = tiny_model(**lsnet)
    inputs = make_input([], []) if empty else make_input(BOXES, [0, 1, 2])
    losses, _ = losses_of(model, [inputs])
    names = [branch.name for branch in model.branches]
    stages = {f"loss_{name}_{stage}" for name in names for stage in ("init", "refine")}
    assert set(losses) == {"loss_cls", *stages}
    assert all(loss.isfinite() for loss in losses.values())
    assert all((losses[name] > 0) != empty for name in stages)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def without_landmarks(inputs, objects):
    """A copy in which these objects have neither mask nor labelled keypoints."""
    inputs = copy.deepcopy(inputs)
    inputs["instances"].gt_contours[objects] = torch.nan
    inputs["instances"].gt_keypoints.tensor[objects] = 0
    return inputs


def test_objects_train_the_branches_that_they_have_landmarks_for():
    model = tiny_model(**JOINT)
    inputs = make_input(BOXES, [0, 1, 2])
    whole, _ = losses_of(model, [inputs])
    partly, _ = losses_of(model, [without_landmarks(inputs, [1, 2])])
    none, _ = losses_of(model, [without_landmarks(inputs, [0, 1, 2])])
    for name in ("loss_cls", "loss_bbox_init", "loss_bbox_refine"):
        assert whole[name] == partly[name] == none[name]
    for name in ("loss_segm_init", "loss_segm_refine", "loss_pose_init", "loss_pose_refine"):
        assert none[name] == 0
        # normalised by the objects that there are: of the size of the whole, not of a third
        assert partly[name].item() == pytest.approx(whole[name].item(), rel=0.5)
        assert partly[name] != whole[name]
    sum(none.values()).backward()
    for name in ("segm", "pose"):
        gradients = [p.grad for p in model.head.branches[name].refine.out.parameters()]
        assert all(g is not None and (g == 0).all() for g in gradients)


def test_an_image_of_other_objects_does_not_dilute_a_branch():
    """A batch half of which has no masks trains contours as the other half alone would."""
    model = tiny_model(**JOINT)
    inputs = make_input(BOXES, [0, 1, 2])
    alone, _ = losses_of(model, [inputs])
    beside, _ = losses_of(model, [inputs, without_landmarks(inputs, [0, 1, 2])])
    for name in ("loss_segm_init", "loss_pose_refine"):
        assert beside[name].item() == pytest.approx(alone[name].item(), rel=1e-5)


@pytest.mark.parametrize("task", ["segm", "pose_kbox"])
def test_objects_without_a_box_of_the_first_branch_are_no_background(task):
    model = tiny_model(TASK=task)
    inputs = make_input(BOXES[:1], [0])
    unboxed = without_landmarks(inputs, [0])
    empty = make_input([], [])
    regions = {**empty, "ignore_boxes": torch.tensor(BOXES[:1], dtype=torch.float32)}
    ignored = losses_of(model, [unboxed])[0]
    assert ignored == losses_of(model, [regions])[0]
    assert ignored["loss_cls"] < losses_of(model, [empty])[0]["loss_cls"]
    released = tiny_model(TASK=task, IGNORE_CROWD=False)
    assert losses_of(released, [unboxed])[0] == losses_of(released, [empty])[0]


def test_unlabelled_poses_teach_their_centre_if_wanted():
    inputs = without_landmarks(make_input(BOXES, [0, 1, 2]), [0])
    default, _ = losses_of(tiny_model(TASK="pose_bbox"), [inputs])
    released, _ = losses_of(tiny_model(TASK="pose_bbox", TRAIN_UNLABELLED_POSES=True), [inputs])
    assert released["loss_bbox_init"] == default["loss_bbox_init"]
    # five of its six vectors count as entirely wrong
    third = (released["loss_pose_init"] * 3 - default["loss_pose_init"] * 2).item()
    assert 5 / 6 < third < 1


def test_joint_inference_has_the_fields_of_all_branches():
    model = tiny_model(SCORE_THRESH_TEST=0.0, TOPK_CANDIDATES_TEST=50, **JOINT).eval()
    model.head.branches["bbox"].refine.out.bias.data = OUTWARDS.flatten()
    inputs = {**make_input([], []), "height": 192, "width": 256}
    with torch.no_grad():
        instances = model([inputs])[0]["instances"]
    count = len(instances)
    assert count > 0
    assert instances.pred_contours.shape == (count, 36, 2)
    assert instances.pred_keypoints.shape == (count, 5, 3)
    assert instances.pred_masks.tensor.shape == (count, 192, 256)
    for points in (instances.pred_contours, instances.pred_keypoints[..., :2]):
        assert points.amin() >= 0 and points[..., 0].max() <= 256 and points[..., 1].max() <= 192
    assert torch.equal(instances.pred_keypoints[:, 0, 2], instances.scores)


def test_small_detections_can_be_dropped():
    options = {"TASK": "pose_kbox", "SCORE_THRESH_TEST": 0.0, "TOPK_CANDIDATES_TEST": 50}
    plain, strict = tiny_model(**options).eval(), tiny_model(**options, MIN_BOX_AREA_TEST=64.0)
    strict.eval().load_state_dict(plain.state_dict())
    for model in (plain, strict):
        torch.manual_seed(0)
        torch.nn.init.normal_(model.head.branches["pose"].refine.out.bias)
    with torch.no_grad():
        inputs = [make_input([], [])]
        areas = plain(inputs)[0]["instances"].pred_boxes.area()
        kept = strict(inputs)[0]["instances"].pred_boxes.area()
    assert 0 < len(kept) < len(areas)
    assert torch.equal(kept, areas[areas > 64])


def test_inference_returns_what_detectron2_expects():
    model = tiny_model(SCORE_THRESH_TEST=0.0, TOPK_CANDIDATES_TEST=50).eval()
    inputs = make_input(BOXES, [0, 1, 2])
    inputs.update(height=192, width=256)
    model.head.branches["bbox"].refine.out.bias.data = OUTWARDS.flatten()
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


def test_a_map_that_the_backbone_lacks_is_named():
    with pytest.raises(ValueError, match=r"MODEL\.LSNET\.IN_FEATURES names \['p8'\]; .* p3, "):
        tiny_model(IN_FEATURES=["p3", "p4", "p8"])


@pytest.mark.parametrize(
    ("names", "strides"),
    [(["p3", "p5", "p7"], "8, 32, 128"), (["p5", "p4", "p3"], "32, 16, 8")],
)
def test_levels_are_in_order_and_without_gaps(names, strides):
    """Or else objects of some sizes would have no level to learn at."""
    with pytest.raises(ValueError, match=rf"IN_FEATURES have strides \[{strides}\]"):
        tiny_model(IN_FEATURES=names)


def test_a_third_stage_and_its_losses_come_together():
    model = tiny_model(POLISH_IN_FEATURES=["p3"])
    parts = {
        "backbone": model.backbone,
        "head": model.head,
        "head_in_features": model.head_in_features,
        "branches": model.branches,
        "num_classes": 3,
        "criterion": model.criterion,
        "pixel_mean": [0.0],
        "pixel_std": [1.0],
    }
    with pytest.raises(ValueError, match="third stage needs its losses"):
        LSNet(**parts)
    assert LSNet(**parts, polish=model.polish).polish is model.polish


def test_features_that_nothing_looks_at_are_known():
    assert tiny_model().unused_features == []
    assert tiny_model(IN_FEATURES=["p3", "p4", "p5"]).unused_features == ["p6", "p7"]
    third = {"IN_FEATURES": ["p4", "p5", "p6"], "POLISH_IN_FEATURES": ["p3", "p4"]}
    assert tiny_model(**third).unused_features == ["p7"]


def test_features_beyond_the_pyramid_are_unused():
    cfg = load_config(
        "",
        ["MODEL.BACKBONE.NAME", "build_lsnet_efficientnet_lite0_fpn_backbone"]
        + ["MODEL.FPN.IN_FEATURES", "['stride8', 'stride16']", "MODEL.FPN.OUT_CHANNELS", "64"]
        + ["MODEL.META_ARCHITECTURE", "LSNet", "MODEL.LSNET.IN_FEATURES", "['p3', 'p4', 'p5']"]
        + ["MODEL.DEVICE", "cpu"],
    )
    assert list(build_backbone(cfg).output_shape()) == ["p3", "p4", "p5", "p6"]
    model = build_model(cfg)
    assert model.unused_features == ["p6", "stride32"]
    cfg.MODEL.EFFICIENTNET.OUT_FEATURES = ["stride4", "stride8", "stride16"]
    assert build_model(cfg).unused_features == ["p6"]

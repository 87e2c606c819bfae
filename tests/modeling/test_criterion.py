import pytest
import torch
from detectron2.utils.events import EventStorage
from tiny_model import make_input, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from lsnet_d2.modeling import criterion
from lsnet_d2.modeling.branches import ExtremeBranch
from lsnet_d2.modeling.criterion import Criterion
from lsnet_d2.modeling.landmarks import LandmarkTargets
from lsnet_d2.modeling.losses import quality_focal_loss
from lsnet_d2.modeling.points import make_anchor_points
from lsnet_d2.modeling.samples import BranchSamples, Matches
from lsnet_d2.modeling.vectors import encode_vectors


def box_landmarks(boxes):
    """(G, 4, 2): the corners that a box's sides begin with, as extreme points of the boxes."""
    x1, y1, x2, y2 = torch.tensor(boxes).unbind(1)
    return torch.stack([x1, y1, x1, y1, x2, y2, x2, y2], dim=1).view(-1, 4, 2)


def test_overlaps_are_those_of_the_predicted_boxes_with_their_objects():
    points = make_anchor_points([(4, 4)], [8], torch.device("cpu"))
    branch = ExtremeBranch()
    true = box_landmarks([[0.0, 0, 10, 10], [8, 8, 24, 24]])
    # found: the left half of the first, the second as it is, and beside it
    found = box_landmarks([[0.0, 0, 5, 10], [8, 8, 24, 24], [24, 8, 40, 24]])
    positives = Matches(
        image=torch.tensor([0, 1, 1]), point=torch.tensor([5, 6, 9]), object=torch.tensor([0, 1, 1])
    )
    ends = torch.cat([found, torch.zeros(3, 1, 2)], dim=1)
    vectors = encode_vectors(ends - points.xy[positives.point][:, None], branch.alpha) / 8
    targets = LandmarkTargets.make(true, branch.boxes(true))
    samples = BranchSamples(branch, vectors, positives, targets)
    overlaps = Criterion.overlaps(points, samples)
    torch.testing.assert_close(overlaps, torch.tensor([0.5, 1.0, 0.0]))


@pytest.mark.parametrize("soft", [False, True])
def test_classes_are_learned_from_what_their_boxes_overlap(soft):
    """Least is lost where the score of the object's class is the overlap, or 1."""
    criterion = tiny_model(CLS_SOFT_LABELS=soft).criterion
    positives = Matches(*torch.tensor([[0, 0], [1, 2], [0, 1]]))
    overlaps = torch.tensor([0.25, 0.75]) if soft else None
    best = torch.zeros(1, 3, 3)
    best[0, 1, 2], best[0, 2, 0] = (0.25, 0.75) if soft else (1.0, 1.0)

    def loss(scores):
        counted = torch.ones(1, 3, dtype=torch.bool)
        logits = scores.clamp(1e-6, 1 - 1e-6).logit()
        classes = torch.tensor([2, 0])
        return criterion.classification_loss(logits, positives, classes, counted, overlaps).item()

    least = loss(best)
    assert least < 1e-6
    for point in range(3):
        for number in range(3):
            for change in (-0.1, 0.1):
                other = best.clone()
                other[0, point, number] += change
                if 0 <= other[0, point, number] <= 1:
                    assert loss(other) > least + 1e-4


@pytest.mark.parametrize("overlaps", [None, torch.tensor([0.5])])
def test_classes_are_not_learned_where_they_are_not_counted(overlaps):
    criterion = tiny_model().criterion
    logits = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0))
    counted = torch.tensor([[True, False, True], [False, True, True]])
    positives = Matches(*torch.tensor([[1], [2], [0]]))

    def loss(logits):
        classes = torch.tensor([1])
        return criterion.classification_loss(logits, positives, classes, counted, overlaps)

    changed = torch.where(counted[..., None], logits, -logits)
    assert loss(changed) == loss(logits) > 0
    assert loss(-logits) != loss(logits)


def test_soft_labels_are_the_overlaps_of_the_refine_stage(monkeypatch):
    inputs = [make_input([[10, 12, 60, 70]], [0])]

    def boxes_around_points(**keys):
        model = tiny_model(**keys).train()
        outwards = torch.zeros(5, 4)
        outwards[[0, 1, 2, 3], [0, 2, 1, 3]] = 2.0
        model.head.branches["bbox"].refine.out.bias.data = outwards.flatten()
        return model

    with EventStorage():
        hard, soft = (
            boxes_around_points()(inputs),
            boxes_around_points(CLS_SOFT_LABELS=True)(inputs),
        )
    assert {name for name in hard if hard[name] != soft[name]} == {"loss_cls"}

    taken = []
    overlaps = Criterion.overlaps

    def recorded(points, first):
        taken.append((first, overlaps(points, first)))
        return taken[-1][1]

    monkeypatch.setattr(Criterion, "overlaps", staticmethod(recorded))
    model = boxes_around_points(CLS_SOFT_LABELS=True)
    with EventStorage():
        again = model(inputs)["loss_cls"]
        points, predictions, _ = model.predict(model.preprocess_image(inputs).tensor)
    assert again == soft["loss_cls"]
    ((first, used),) = taken
    positives = first.positives
    torch.testing.assert_close(
        first.vectors, predictions.refine[0][positives.image, positives.point]
    )
    assert 0 < used.max() < 1 and (used > 0).sum() <= len(positives)
    target = torch.zeros_like(predictions.logits)
    target[positives.image, positives.point, 0] = used
    expected = quality_focal_loss(predictions.logits, target).sum() / len(positives)
    torch.testing.assert_close(again, expected)


def test_the_config_says_how_many_points_learn(monkeypatch):
    model = tiny_model(INIT_POSITIVES=3, ATSS_TOPK=5).train()
    seen = []
    assign = criterion.assign_atss

    def spy(*args, **kwargs):
        seen.append(kwargs["topk"])
        return assign(*args, **kwargs)

    monkeypatch.setattr(criterion, "assign_atss", spy)
    with EventStorage() as storage:
        model([make_input([[10, 12, 60, 70]], [0])])
        assert storage.latest()["lsnet/num_pos_init"][0] == 3
    assert seen == [5]


def test_soft_labels_need_boxes_that_are_not_the_keypoints():
    with pytest.raises(ValueError, match="CLS_SOFT_LABELS is True.*unlabelled"):
        tiny_model(TASK="pose_kbox", CLS_SOFT_LABELS=True)


@pytest.mark.parametrize("key", ["INIT_POSITIVES", "ATSS_TOPK"])
def test_numbers_of_points_are_positive(key):
    with pytest.raises(ValueError, match=rf"MODEL\.LSNET\.{key} is 0"):
        tiny_model(**{key: 0})


@pytest.mark.parametrize("labelled", [[0], [0, 2]])  # the latter are one above the other
def test_keypoints_that_span_no_box_make_no_background(labelled):
    """Nothing is learned of where the object is, but not that there is none either."""
    inputs = make_input([[30, 30, 90, 80]], [1])
    keypoints = inputs["instances"].gt_keypoints.tensor
    keypoints[0, :, 2] = 0
    keypoints[0, labelled, 2] = 2
    model = tiny_model(TASK="pose_kbox")
    points = make_anchor_points([(12, 16), (6, 8), (3, 4)], [8, 16, 32], torch.device("cpu"))
    truth = model.criterion.ground_truth(points, [(96, 128)], [inputs])
    assert len(truth.classes[0]) == 1
    assert truth.regions[0].tolist() == [[30, 30, 90, 80]]
    assert truth.ignored.sum() > 40


class _Waits(TorchDispatchMode):
    """Counts operators for whose result a host has to wait for its GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        masks = args[1] if name in ("index", "index_put", "index_put_") else ()
        self.count += name in ("nonzero", "_local_scalar_dense", "bincount", "masked_select")
        self.count += any(i is not None and i.dtype == torch.bool for i in masks)
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("keys", "most"),
    [
        ({}, 4),
        (
            {
                "TASK": "joint",
                "BRANCHES": ["extreme", "contour", "keypoint"],
                "POLISH_IN_FEATURES": ["p3"],
                "POLISH_POSITIVES": 2,
                "KEYPOINT_SEARCH": True,
            },
            9,
        ),
    ],
)
def test_waits_little_for_a_gpu_at_each_image(keys, most):
    model = tiny_model(**keys).train()

    def waits(num_images):
        inputs = [make_input([[10, 12, 60, 70], [20, 20, 80, 90]], [0, 1])] * num_images
        with EventStorage(), _Waits() as mode:
            model(inputs)
        return mode.count

    one, three = waits(1), waits(3)
    assert 0 < (three - one) / 2 <= most

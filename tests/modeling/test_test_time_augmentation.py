import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.detection_utils import build_augmentation
from detectron2.data.transforms import HFlipTransform, ResizeTransform, TransformList
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from parity import Recorded
from tiny_model import make_input, tiny_cfg, tiny_model

from lsnet_d2.data.images import ImageError
from lsnet_d2.errors import ConfigError
from lsnet_d2.modeling.branches import ContourBranch, ExtremeBranch, KeypointBranch
from lsnet_d2.modeling.postprocessing import make_instances
from lsnet_d2.modeling.test_time_augmentation import (
    LSNetDatasetMapperTTA,
    LSNetWithTTA,
    batches_of_one_size,
    boxes_in_range,
    keep_image_sizes,
    map_back,
    vote,
)

COCO_KEYPOINTS = ["keypoints_coco_2017_val"]


def recorded_vote(case):
    recorded = Recorded("comp_vote.npz", f"{case}.")
    return recorded, {
        "boxes": recorded["boxes"],
        "landmarks": recorded["vectors"].unflatten(1, (-1, 2)),
        "scores": recorded["scores"],
        "classes": torch.zeros(len(recorded["boxes"]), dtype=torch.int64),
    }


class TestVote:
    @pytest.mark.parametrize("case", ["v0", "v1", "v2", "v3"])
    @pytest.mark.parametrize("prefix", ["", "cpv_"])
    def test_is_that_of_the_released_code(self, parity, case, prefix):
        recorded, detections = recorded_vote(case)
        if prefix:  # boxes only
            detections["landmarks"] = detections["landmarks"][:, :0]
        boxes, landmarks, scores, *_ = vote(**detections, iou_thresh=0.66, score_thresh=0.05)
        parity.absolute("votes, scores", scores, recorded[f"{prefix}out_scores"], within=1e-6)
        expected = recorded[f"{prefix}out_boxes"]
        parity.absolute("votes, boxes", boxes, expected, within=1e-3, unit="px")
        if not prefix:
            landmarks, expected = landmarks.flatten(1), recorded["out_vectors"]
            parity.absolute("votes, landmarks", landmarks, expected, within=1e-3, unit="px")

    def test_keeps_a_class_with_one_detection(self):
        """The released code drops it, which is what was recorded."""
        recorded, detections = recorded_vote("v4")
        assert len(recorded["out_boxes"]) == 0
        *merged, best = vote(**detections, iou_thresh=0.66, score_thresh=0.05)
        assert best.tolist() == list(range(len(merged[0])))
        for actual, given in zip(merged, detections.values(), strict=True):
            torch.testing.assert_close(actual, given)

    def test_of_nothing_is_nothing(self):
        _, detections = recorded_vote("v5")
        boxes, landmarks, *rest = vote(**detections, iou_thresh=0.66, score_thresh=0.05)
        assert boxes.shape == (0, 4) and landmarks.shape == (0, 4, 2)
        assert all(values.shape == (0,) for values in rest)

    def test_by_hand(self):
        boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [0, 0, 10, 10], [50, 50, 60, 60]])
        landmarks = torch.arange(8.0).view(4, 1, 2)
        scores, classes = torch.tensor([0.6, 0.3, 0.5, 0.2]), torch.tensor([1, 1, 2, 1])
        boxes, landmarks, scores, classes, best = vote(
            boxes, landmarks, scores, classes, iou_thresh=0.66, score_thresh=0.05
        )
        assert best.tolist() == [0, 2, 3, 1]
        # the second box, with IOU 0.8, votes with the first and is kept with 0.3 * (1 - 0.8)
        assert scores.tolist() == pytest.approx([0.6, 0.5, 0.2, 0.06])
        assert classes.tolist() == [1, 2, 1, 1]
        assert boxes[0].tolist() == pytest.approx([0, 0, 10, (0.6 * 10 + 0.3 * 8) / 0.9])
        assert boxes[1:, 3].tolist() == [10, 60, 8]
        assert landmarks[0, 0].tolist() == pytest.approx([0.3 * 2 / 0.9, (0.6 + 0.3 * 3) / 0.9])
        assert landmarks[1:, 0].tolist() == [[4, 5], [6, 7], [2, 3]]

    def test_does_not_depend_on_the_order(self):
        _, detections = recorded_vote("v1")
        detections["classes"] = torch.arange(120) % 3
        expected = vote(**detections, iou_thresh=0.66, score_thresh=0.05)
        shuffled = torch.randperm(120, generator=torch.Generator().manual_seed(0))
        detections = {key: values[shuffled] for key, values in detections.items()}
        actual = vote(**detections, iou_thresh=0.66, score_thresh=0.05)
        assert torch.equal(shuffled[actual[-1]], expected[-1])
        for one, other in zip(actual[:-1], expected[:-1], strict=True):
            assert torch.equal(one, other)

    def test_each_class_votes_by_itself(self):
        _, detections = recorded_vote("v0")
        classes = detections["classes"] = torch.arange(60) % 2
        together = vote(**detections, iou_thresh=0.66, score_thresh=0.05)
        for label in range(2):
            alone = {key: values[classes == label] for key, values in detections.items()}
            alone = vote(**alone, iou_thresh=0.66, score_thresh=0.05)
            of_class = [values[together[3] == label] for values in together]
            for one, other in zip(of_class[:-1], alone[:-1], strict=True):
                assert torch.equal(one, other)

    def test_landmarks_stay_with_their_object(self):
        """Landmarks that are at fixed places of their box are so after the vote too."""
        _, detections = recorded_vote("v0")
        corners = detections["boxes"].unflatten(1, (2, 2))
        weights = torch.tensor([[0.3, 0.7], [1.0, 0.0], [0.2, 0.8]])
        detections["landmarks"] = weights @ corners
        boxes, landmarks, *_ = vote(**detections, iou_thresh=0.66, score_thresh=0.05)
        torch.testing.assert_close(landmarks, weights @ boxes.unflatten(1, (2, 2)))


@pytest.mark.parametrize("bounds", [(96, 10000), (64, 10000), (0, 10000), (0, 256), (0, 96)])
def test_size_ranges_are_those_of_the_released_code(parity, bounds):
    recorded = Recorded("comp_vote.npz", "remove.")
    kept = torch.nonzero(boxes_in_range(Boxes(recorded["boxes"]), *bounds)).squeeze(1)
    parity.equal("boxes of a range of sizes", kept, recorded[f"keep_{bounds[0]}_{bounds[1]}"])


def test_inverted_boxes_are_in_no_range():
    inverted = Boxes(torch.tensor([[20.0, 20, 10, 10], [20, 10, 10, 20], [10, 10, 20, 20]]))
    assert boxes_in_range(inverted, 0, float("inf")).tolist() == [False, False, True]


FLIPS = [
    ("bbox", ExtremeBranch(), "extremes"),
    ("segm", ContourBranch(), "polygons"),
    ("pose_bbox", KeypointBranch(), "keypoints"),
]


@pytest.mark.parametrize(("task", "branch", "key"), FLIPS, ids=[task for task, *_ in FLIPS])
@pytest.mark.parametrize("flip", [0, 1])
def test_mapping_back_is_that_of_the_released_code(parity, task, branch, key, flip):
    recorded = Recorded("comp_flip.npz")
    count = branch.num_landmarks
    points = recorded[key].float().unflatten(1, (-1, 3 if key == "keypoints" else 2))
    points = points[:, :count, :2]
    height, width = recorded["img_hw"].tolist()
    scale_x, scale_y = recorded["test.scale_factor"][:2].tolist()
    scores, classes = torch.ones(len(points)), torch.zeros(len(points), dtype=torch.int64)
    boxes = recorded["boxes"]
    instances = make_instances((height, width), boxes, scores, classes, [branch], [points])
    instances.pred_boxes = Boxes(boxes)
    instances.set(branch.pred_field, points)  # not clipped
    # of a size that is not rounded, as the recorded scale is not that of any
    size = (height / scale_y, width / scale_x)
    transforms = [ResizeTransform(*size, height, width)] + flip * [HFlipTransform(width)]
    expected = recorded.under(f"test.mapback_{task}_flip{flip}")
    indices = branch.flip_indices(COCO_KEYPOINTS)
    result = map_back(instances, TransformList(transforms), size, [branch], [indices])
    limit = torch.tensor(size[::-1])
    boxes = expected["boxes"].view(-1, 2, 2).clamp(min=0).minimum(limit).flatten(1)
    actual = result.pred_boxes.tensor
    parity.absolute("boxes mapped back", actual, boxes, within=1e-3, unit="px")
    vectors = expected["vectors"].unflatten(1, (-1, 2)).clamp(min=0).minimum(limit)
    actual = result.get(branch.pred_field)[..., :2]
    parity.absolute("landmarks mapped back", actual, vectors, within=1e-3, unit="px")
    assert torch.equal(instances.get(branch.pred_field), points)  # not written into


@pytest.fixture
def joint():
    """Config and tiny model of all branches that finds much in noise."""
    name = "five_keypoints"
    MetadataCatalog.get(name).set(
        keypoint_names=["top", "left", "bottom", "right", "middle"],
        keypoint_flip_map=[("left", "right")],
    )
    cfg = tiny_cfg(TASK="joint", BRANCHES=["extreme", "contour", "keypoint"], PRIOR_PROB=0.2)
    cfg.DATASETS.TEST = (name,)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    for parameter in model.head.parameters():  # the released initialisation is nearly 0
        parameter.data += 0.05 * torch.randn_like(parameter)
    yield cfg, model
    MetadataCatalog.pop(name)


FIELDS = ["pred_boxes", "scores", "pred_extreme_points", "pred_contours", "pred_keypoints"]


def values(instances, field):
    value = instances.get(field)
    return value.tensor if isinstance(value, Boxes) else value


def assert_same(actual, expected, atol=0.01):
    assert actual.image_size == expected.image_size
    assert len(actual) == len(expected) > 5
    assert torch.equal(actual.pred_classes, expected.pred_classes)
    for field in FIELDS:
        torch.testing.assert_close(
            values(actual, field), values(expected, field), rtol=0, atol=atol
        )


@torch.no_grad()
def test_what_changes_nothing_gives_the_same(joint):
    """Copies of the image vote like the one, in batches or alone."""
    cfg, model = joint
    image = make_input([], [])
    image.update(height=192, width=256)  # the image was halved before
    plain = model([image])[0]["instances"]
    height, width = image["image"].shape[1:]
    for sizes, method in (([height], "vote"), ([height] * 3, "vote"), ([height] * 2, "nms")):
        cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.METHOD = sizes, method
        cfg.TEST.AUG.FLIP = False
        (output,) = LSNetWithTTA(cfg, model)([image])
        assert_same(output["instances"], plain)
        assert (output["instances"].pred_masks.contours == output["instances"].pred_contours).all()


ORDERS = ([0, 3, 2, 1], [0, *range(35, 0, -1)], [0, 3, 2, 1, 4])  # of landmarks when mirrored


@pytest.fixture
def exact(joint, monkeypatch):
    """The joint model, finding the same six objects in whatever is made of the image."""
    cfg, model = joint
    generator = torch.Generator().manual_seed(0)
    boxes = [[x, y, x + side, y + side] for side in (10.0, 40.0) for x, y in ((0, 0), (60, 9))]
    boxes = torch.tensor([*boxes, [5.0, 50, 30, 60], [100.0, 10, 128, 96]])
    landmarks = []
    for branch in model.branches:
        places = torch.rand(6, branch.num_landmarks, 2, generator=generator)
        landmarks.append(boxes[:, None, :2] + places * (boxes[:, None, 2:] - boxes[:, None, :2]))
    scores, classes = torch.linspace(0.9, 0.4, 6), torch.arange(6) % 3

    def forward(batch, do_postprocess):
        assert not do_postprocess
        assert len({x["image"].shape for x in batch}) == 1
        results = []
        for x in batch:
            moved = [x["transforms"].apply_coords(p.view(-1, 2).numpy().copy()) for p in landmarks]
            points = [torch.from_numpy(p).view(6, -1, 2) for p in moved]
            if isinstance(x["transforms"].transforms[-1], HFlipTransform):
                points = [p[:, order] for p, order in zip(points, ORDERS, strict=True)]
            found = torch.from_numpy(x["transforms"].apply_box(boxes.numpy()))
            size = tuple(x["image"].shape[1:])
            results.append(make_instances(size, found, scores, classes, model.branches, points))
        return results

    monkeypatch.setattr(model, "forward", forward)
    expected = make_instances((96, 128), boxes, scores, classes, model.branches, landmarks)
    return cfg, model, expected


def test_an_exact_model_gives_the_same_with_any_augmentation(exact):
    cfg, model, expected = exact
    image = make_input([], [])
    for sizes in ([48], [96, 53, 200]):
        for flip in (False, True):
            cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.FLIP = sizes, flip
            (output,) = LSNetWithTTA(cfg, model)([image])
            assert_same(output["instances"], expected, atol=1e-3)
    image["image"] = image["image"][:, ::2, ::2]  # it was halved before; results are not
    (output,) = LSNetWithTTA(cfg, model)([image])
    assert_same(output["instances"], expected, atol=1e-3)


@pytest.mark.parametrize(
    ("sampling", "method", "voting"),
    [("adaptive", "vote", False), ("reference", "vote", True), ("adaptive", "nms", False)],
)
def test_contours_that_mirroring_may_reorder_have_no_mean(
    exact, monkeypatch, sampling, method, voting
):
    """They are the best detection's. Scores of contours stay their own, with or without a mean."""
    cfg, model, expected = exact
    forward = model.forward

    def reordering(batch, do_postprocess):
        results = forward(batch, do_postprocess)
        for x, found in zip(batch, results, strict=True):
            if isinstance(x["transforms"].transforms[-1], HFlipTransform):
                found.pred_contours = found.pred_contours.roll(18, 1)
                found.scores = 0.9 * found.scores
            found.contour_scores = 0.5 * found.scores
        return results

    monkeypatch.setattr(model, "forward", reordering)
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.FLIP = [96], True
    cfg.TEST.AUG.METHOD, cfg.INPUT.CONTOUR_SAMPLING = method, sampling
    (output,) = LSNetWithTTA(cfg, model)([make_input([], [])])
    found = output["instances"]
    assert found.scores.tolist() == pytest.approx(expected.scores.tolist())
    far = (found.pred_contours - expected.pred_contours).abs().amax((1, 2))
    assert (far > 1).all() if voting else (far < 1e-3).all()
    assert found.contour_scores.tolist() == pytest.approx((0.5 * expected.scores).tolist())


def test_sizes_are_those_in_the_augmented_image(exact):
    cfg, model, _ = exact
    cfg.TEST.AUG.MIN_SIZES = [96, 192]  # sides of 10, 16, 40 and 49, and twice that
    for ranges, found in (
        ([[0, 12], [90, 10000]], [0, 1, 5]),
        ([[30, 45], [0, 12]], [2, 3]),
        ([[0, 1], [0, 1]], []),
        ([], [0, 1, 2, 3, 4, 5]),
    ):
        cfg.TEST.AUG.SIZE_RANGES = ranges
        (output,) = LSNetWithTTA(cfg, model)([make_input([], [])])
        scores = output["instances"].scores
        assert [round((0.9 - score) / 0.1) for score in scores.tolist()] == found


def test_the_limit_after_merging_is_its_own(joint):
    cfg, model = joint
    cfg.TEST.DETECTIONS_PER_IMAGE = 20
    assert LSNetWithTTA(cfg, model).max_detections_per_image == 20
    cfg.TEST.AUG.DETECTIONS_PER_IMAGE = 1000
    assert LSNetWithTTA(cfg, model).max_detections_per_image == 1000


def test_landmarks_lose_as_much_as_their_object(joint):
    """Where one is found again, the worse one is left with little of its score."""
    cfg, model = joint
    instances = Instances((100, 100))
    instances.pred_boxes = Boxes(torch.tensor([[0.0, 0.0, 100.0, 100.0], [0.0, 0.0, 100.0, 80.0]]))
    instances.scores = torch.tensor([0.6, 0.3])
    instances.pred_classes = torch.tensor([0, 0])
    instances.pred_extreme_points = torch.zeros(2, 4, 2)
    instances.pred_contours = torch.zeros(2, 36, 2)
    instances.pred_keypoints = torch.zeros(2, 5, 3)
    instances.contour_scores = instances.scores / 2
    instances.pose_scores = instances.scores / 3
    merged = LSNetWithTTA(cfg, model).merge(instances)
    assert len(merged) == 2 and merged.scores[0] == 0.6 and merged.scores[1] < 0.2
    torch.testing.assert_close(merged.contour_scores, merged.scores / 2)
    torch.testing.assert_close(merged.pose_scores, merged.scores / 3)


def test_best_detections_and_large_boxes_are_kept(exact, monkeypatch):
    cfg, model, _ = exact
    cfg.TEST.DETECTIONS_PER_IMAGE = 4
    cfg.TEST.AUG.MIN_SIZES = [200]
    image = make_input([], [])
    (output,) = LSNetWithTTA(cfg, model)([image])
    assert output["instances"].scores.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.6])
    # in pixels of the original image, of the four
    monkeypatch.setattr(model, "test_min_box_area", 1024)
    (output,) = LSNetWithTTA(cfg, model)([image])
    assert output["instances"].scores.tolist() == pytest.approx([0.7, 0.6])


def test_batches_have_images_of_one_size():
    inputs = [{"image": torch.zeros(3, h, 4), "number": n} for n, h in enumerate([5, 5, 5, 6, 5])]
    batches = batches_of_one_size(inputs, 2)
    assert [[x["number"] for x in batch] for batch in batches] == [[0, 1], [2], [3], [4]]


def test_images_are_resized_once():
    cfg = tiny_cfg()
    kept = keep_image_sizes(cfg)
    assert cfg.INPUT.MIN_SIZE_TEST == 800
    pixels = T.AugInput(np.zeros((30, 50, 3), np.uint8))
    T.AugmentationList(build_augmentation(kept, is_train=False))(pixels)
    assert pixels.image.shape == (30, 50, 3)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MIN_SIZES", [], r"is \[\]; it must list one or more"),
        ("MIN_SIZES", [0], r"is \[0\]; it must list one or more"),
        ("MIN_SIZES", ["400"], "is .*; it must list one or more"),
        ("MAX_SIZE", 0, "is 0; it must be 1 or more"),
        ("SIZE_RANGES", [[0, 10]], "has 1 ranges; it must have one for each of the 9 TEST.AUG.MIN"),
        ("SIZE_RANGES", [[0, 10]] * 8 + [[10, 0]], r"has \[10, 0\]; a range is two numbers"),
        ("SIZE_RANGES", [0, 10] * 4 + [3], "has 0; a range is two numbers"),
        ("METHOD", "mean", "is 'mean'; it must be one of vote, nms"),
        ("VOTE_IOU", 1.5, "is 1.5; it must be over 0"),
    ],
)
def test_bad_settings_name_their_key(key, value, message):
    cfg = tiny_cfg()
    cfg.TEST.AUG[key] = value
    with pytest.raises(ValueError, match=f"TEST.AUG.{key} {message}"):
        LSNetWithTTA(cfg, tiny_model())


def test_images_of_which_a_size_leaves_nothing():
    mapper = LSNetDatasetMapperTTA(min_sizes=[40, 400], max_size=600, flip=True)
    strip = {"image": torch.zeros(3, 1, 5000), "height": 1, "width": 5000, "file_name": "strip.png"}
    with pytest.raises(ImageError, match="strip.png: too narrow .* 5000 x 1 .* 600 x 0"):
        mapper(strip)


def test_keypoints_that_are_not_known_cannot_be_mirrored():
    cfg = tiny_cfg(TASK="pose_kbox")
    cfg.DATASETS.TEST = ("nothing_known",)
    with pytest.raises(ConfigError, match="metadata of nothing_known have no keypoint_names"):
        LSNetWithTTA(cfg, tiny_model(TASK="pose_kbox"))
    cfg.TEST.AUG.FLIP = False  # nor need they be
    LSNetWithTTA(cfg, tiny_model(TASK="pose_kbox"))


def test_other_models_and_training_are_refused(joint):
    with pytest.raises(TypeError, match="takes an LSNet, not Linear"):
        LSNetWithTTA(torch.nn.Linear(1, 1), tta_mapper=list, flip_indices=[])
    tta = LSNetWithTTA(*joint)
    assert not tta.training
    with pytest.raises(AssertionError, match="eval"):
        tta.train()([make_input([], [])])

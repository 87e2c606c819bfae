import math

import pytest
import torch
from detectron2.structures import Boxes, Instances, Keypoints
from parity import Recorded
from tiny_model import tiny_cfg

from lsnet_d2.layers.deform_conv import tap_offsets
from lsnet_d2.modeling.branches import (
    ContourBranch,
    ExtremeBranch,
    KeypointBranch,
    build_branches,
)
from lsnet_d2.modeling.landmarks import LandmarkBranch, LandmarkTargets, span_boxes
from lsnet_d2.modeling.vectors import encode_vectors


def channels_last(recorded, key, width):
    """A recorded map (B, C, H, W) as (B, H, W, C / width, width)."""
    return recorded[key].unflatten(1, (-1, width)).permute(0, 3, 4, 1, 2)


class TestExtremeBranch:
    def test_sampling_points_are_those_of_the_released_code(self, parity):
        recorded = Recorded("comp_head_decode.npz", "bbox.")
        vectors = channels_last(recorded, "softplus", 4)
        free = recorded["raw_init"][:, 20:].unflatten(1, (4, 2)).permute(0, 3, 4, 1, 2).flip(-1)
        points = ExtremeBranch().sampling_points(vectors, free)
        expected = channels_last(recorded, "kernel_points_yx", 2).flip(-1)
        parity.to_largest("sampling places", points, expected, within=1e-6)
        offsets = channels_last(recorded, "dcn_offset", 2).flip(-1)
        moved = points - tap_offsets(3)
        parity.to_largest("sampling offsets", moved, offsets, within=1e-6)

    def test_boxes_are_those_of_the_released_code(self, parity):
        recorded = Recorded("comp_head_decode.npz", "bbox.")
        branch = ExtremeBranch()
        vectors = channels_last(recorded, "softplus", 4)
        origin = torch.zeros(*vectors.shape[:-2], 2)
        boxes = branch.boxes(branch.decode(vectors, origin, torch.ones(vectors.shape[:-2])))
        expected = recorded["boxes"].permute(0, 2, 3, 1)
        parity.to_largest("boxes of landmarks", boxes, expected, within=1e-6)

    def test_targets_end_with_the_centre_of_the_box(self):
        instances = Instances((100, 100))
        instances.gt_boxes = Boxes(torch.tensor([[10.0, 20.0, 30.0, 60.0]]))
        instances.gt_extreme_points = torch.arange(8.0).view(1, 4, 2)
        targets = ExtremeBranch().targets(instances)
        assert targets.points[0, :4].tolist() == torch.arange(8.0).view(4, 2).tolist()
        assert targets.points[0, 4].tolist() == [20.0, 40.0]

    def test_quality_is_defined_for_points_that_have_changed_sides(self):
        branch = ExtremeBranch()
        true = torch.tensor([[[5.0, 0], [0, 5], [5, 10], [10, 5]]]).expand(2, 4, 2)
        found = true.clone()
        found[1] = torch.tensor([[5.0, 0], [10, 5], [5, 10], [0, 5]])  # left and right
        targets = LandmarkTargets.make(true, branch.boxes(true))
        assert branch.quality(found, targets).tolist() == [1, 0]

    def test_loss_of_a_perfect_prediction_is_zero_in_any_unit(self):
        branch = ExtremeBranch()
        landmarks = torch.tensor([[[20.0, 5.0], [5.0, 30.0], [25.0, 50.0], [40.0, 28.0]]])
        targets = LandmarkTargets.make(landmarks, branch.boxes(landmarks))
        anchors = torch.tensor([[16.0, 24.0]])
        vectors = encode_vectors(targets.points - anchors[:, None], branch.alpha)
        for unit in (1.0, 32.0):
            loss = branch.loss(vectors, targets, anchors, torch.tensor([unit]))
            assert loss.item() == pytest.approx(0, abs=1e-5)
        assert branch.loss(vectors * 1.5, targets, anchors, torch.tensor([32.0])).item() > 0.3

    def test_predictions_are_clipped_and_rescaled(self):
        instances = Instances((50, 100), scores=torch.tensor([0.7]), pred_classes=torch.tensor([0]))
        landmarks = torch.tensor([[[20.0, -5.0], [5.0, 30.0], [25.0, 60.0], [140.0, 28.0]]])
        branch = ExtremeBranch()
        branch.add_predictions(instances, landmarks, instances.scores)
        clipped = [[20.0, 0.0], [5.0, 30.0], [25.0, 50.0], [100.0, 28.0]]
        assert instances.pred_extreme_points[0].tolist() == clipped
        larger = Instances((100, 300), pred_extreme_points=instances.pred_extreme_points)
        branch.rescale_predictions(larger, (3.0, 2.0))
        assert larger.pred_extreme_points[0].tolist() == [[3 * x, 2 * y] for x, y in clipped]


@pytest.mark.parametrize(
    ("recording", "branch"), [("segm.", ContourBranch()), ("pose_bbox.", KeypointBranch())]
)
class TestContourAndKeypointBranch:
    def test_sampling_points_are_those_of_the_released_code(self, parity, recording, branch):
        recorded = Recorded("comp_head_decode.npz", recording)
        vectors = channels_last(recorded, "softplus", 4)
        points = branch.sampling_points(vectors, vectors.new_zeros(*vectors.shape[:-2], 0, 2))
        expected = channels_last(recorded, "kernel_points_yx", 2).flip(-1)
        parity.to_largest("sampling places", points, expected, within=1e-6)

    def test_landmarks_and_boxes_are_those_of_the_released_code(self, parity, recording, branch):
        recorded = Recorded("comp_head_decode.npz", recording)
        vectors = channels_last(recorded, "softplus", 4)
        origin = torch.zeros(*vectors.shape[:-2], 2)
        landmarks = branch.decode(vectors, origin, torch.ones(vectors.shape[:-2]))
        expected = channels_last(recorded, "landmarks_xy", 2)
        parity.to_largest("decoded landmarks", landmarks, expected, within=1e-6)
        expected = recorded["boxes"].permute(0, 2, 3, 1)
        boxes = branch.boxes(landmarks)
        parity.to_largest("boxes of landmarks", boxes, expected, within=1e-6)

    def test_loss_of_a_perfect_prediction_is_zero_in_any_unit(self, recording, branch):
        generator = torch.Generator().manual_seed(0)
        landmarks = torch.rand(2, branch.num_landmarks, 2, generator=generator) * 50 + 5
        targets = LandmarkTargets.make(landmarks, span_boxes(landmarks))
        anchors = torch.tensor([[16.0, 24.0], [40.0, 8.0]])
        vectors = encode_vectors(targets.points - anchors[:, None], branch.alpha)
        for unit in (1.0, 32.0):
            loss = branch.loss(vectors, targets, anchors, torch.full((2,), unit))
            assert loss.tolist() == pytest.approx([0, 0], abs=1e-5)
            worse = branch.loss(vectors * 1.5, targets, anchors, torch.full((2,), unit))
            assert (worse > 0.3).all()


class TestContourBranch:
    @pytest.mark.parametrize("num_points", [8, 9, 17, 36, 64, 128])
    def test_samples_at_eight_vertices_and_the_centre(self, num_points):
        branch = ContourBranch(num_points=num_points)
        assert branch.num_free_points == 0
        chosen = branch.sampling_landmarks
        assert chosen == sorted(set(chosen)) and len(chosen) == 8 and chosen[-1] < num_points

    @pytest.mark.parametrize("num_points", [7, 129])
    def test_number_of_vertices_is_limited(self, num_points):
        with pytest.raises(ValueError, match=r"NUM_CONTOUR_POINTS.*8 to 128"):
            ContourBranch(num_points=num_points)

    def test_final_contours_may_have_other_vertices(self):
        assert ContourBranch().traced_points == 0
        branch = ContourBranch(traced_points=72)
        assert branch.num_landmarks == 36
        assert branch.flip_indices([]) == [0, *range(71, 0, -1)]
        with pytest.raises(ValueError, match=r"TRACED_POINTS is 7; it must be from 8 to 128"):
            ContourBranch(traced_points=7)

    def test_objects_without_a_contour_are_absent(self):
        instances = Instances((100, 100))
        contours = torch.rand(3, 36, 2) * 50
        contours[1] = torch.nan
        instances.gt_contours = contours
        targets = ContourBranch().targets(instances)
        assert targets.present.tolist() == [True, False, True]
        assert targets.points.isfinite().all()
        assert torch.equal(targets.boxes[2], span_boxes(contours[2]))

    def test_masks_are_those_of_the_rescaled_contours(self):
        branch = ContourBranch(num_points=8)
        square = [[10, 5], [5, 5], [5, 10], [5, 15], [10, 15], [15, 15], [15, 10], [15, 5]]
        instances = Instances((20, 20), pred_contours=torch.tensor([square], dtype=torch.float32))
        branch.rescale_predictions(instances, (1.0, 0.5))
        (mask,) = instances.pred_masks
        assert mask.sum() == 10 * 5 and mask[3:7, 5:15].all()


class TestKeypointBranch:
    def targets(self, visibility, **kwargs):
        keypoints = torch.arange(6.0).view(1, 3, 2).repeat(len(visibility), 1, 1)
        keypoints = torch.cat([keypoints, torch.tensor(visibility)[..., None].float()], dim=2)
        instances = Instances((100, 100), gt_keypoints=Keypoints(keypoints))
        instances.gt_classes = torch.arange(len(visibility))
        instances.gt_boxes = Boxes(torch.tensor([[0.0, 0, 20, 40]] * len(visibility)))
        return KeypointBranch(num_keypoints=3, **kwargs).targets(instances)

    def test_box_is_that_of_labelled_keypoints(self):
        targets = self.targets([[2, 1, 0], [0, 2, 0], [0, 0, 0]])
        assert targets.boxes.tolist() == [[0, 1, 2, 3], [2, 3, 2, 3], [0, 0, 0, 0]]
        assert targets.visible.tolist() == [
            [True, True, False],
            [False, True, False],
            [False, False, False],
        ]

    def test_objects_without_labelled_keypoints_are_absent_unless_wanted(self):
        assert self.targets([[0, 1, 0], [0, 0, 0]]).present.tolist() == [True, False]
        targets = self.targets([[0, 1, 0], [0, 0, 0]], train_unlabelled=True)
        assert targets.present.tolist() == [True, True]
        targets = self.targets([[0, 1, 0], *[[0, 0, 0]] * 2], train_unlabelled=True, classes=[2])
        assert targets.present.tolist() == [False, False, True]

    def test_keypoints_of_other_classes_are_not_learned(self):
        targets = self.targets([[0, 1, 2], [0, 1, 2]], classes=[1])
        assert targets.present.tolist() == [False, True]
        assert targets.visible.tolist() == [[False] * 3, [False, True, True]]
        assert targets.boxes.isfinite().all()

    @pytest.mark.parametrize("visibility", [[0, 0, 2], [0, 2, 2], [2, 2, 2]])
    def test_quality_is_that_of_the_whole_object_however_few_keypoints_are_labelled(
        self, visibility
    ):
        """COCO's similarity: an object of 20 x 40 pixels, half covered, all keypoints 2 off."""
        targets = self.targets([visibility])
        quality = KeypointBranch(num_keypoints=3).quality(targets.landmarks + 2**0.5, targets)
        assert quality.item() == pytest.approx(math.exp(-4 / (2 * 0.14**2 * 400)), rel=1e-5)

    @pytest.mark.parametrize(
        ("count", "free"), [(1, 7), (5, 3), (8, 0), (13, 0), (17, 0), (133, 0)]
    )
    def test_any_number_of_keypoints(self, count, free):
        branch = KeypointBranch(num_keypoints=count)
        assert branch.num_free_points == free
        assert max(branch.sampling_landmarks) < count

    def test_predictions_are_rescaled_and_have_the_score_of_the_detection(self):
        branch = KeypointBranch(num_keypoints=2)
        instances = Instances((50, 100), scores=torch.tensor([0.7]), pred_classes=torch.tensor([0]))
        branch.add_predictions(
            instances, torch.tensor([[[20.0, -5.0], [140.0, 28.0]]]), instances.scores
        )
        assert instances.pred_keypoints[0].flatten().tolist() == pytest.approx(
            [20, 0, 0.7, 100, 28, 0.7]
        )
        branch.rescale_predictions(instances, (0.5, 0.5))
        expected = pytest.approx([10, 0, 0.7, 50, 14, 0.7])
        assert instances.pred_keypoints[0].flatten().tolist() == expected

    def test_keypoints_of_classes_without_any_score_nothing(self):
        branch = KeypointBranch(num_keypoints=2, classes=[1])
        scores, classes = torch.tensor([0.7, 0.6]), torch.tensor([0, 1])
        instances = Instances((50, 100), scores=scores, pred_classes=classes)
        branch.add_predictions(instances, torch.zeros(2, 2, 2), instances.scores)
        assert instances.pred_keypoints[..., 2].tolist() == [[0, 0], pytest.approx([0.6, 0.6])]
        assert branch.scores(instances).tolist() == pytest.approx([0, 0.6])

    def test_needs_a_keypoint(self):
        with pytest.raises(ValueError, match="NUM_KEYPOINTS is 0"):
            KeypointBranch(num_keypoints=0)


class TestBuildBranches:
    def test_task(self):
        (branch,) = build_branches(tiny_cfg(CROSS_IOU_ALPHA=0.3))
        assert isinstance(branch, ExtremeBranch) and branch.alpha == 0.3
        assert branch.num_vectors == 5 and branch.num_free_points == 4

    @pytest.mark.parametrize(
        ("task", "expected"),
        [
            ("segm", {"segm": (1, 2)}),
            ("pose_bbox", {"bbox": (0.1, 0.2), "pose": (1, 2)}),
            ("pose_kbox", {"pose": (1, 2)}),
        ],
    )
    def test_tasks_have_the_weights_of_the_paper(self, task, expected):
        branches = build_branches(tiny_cfg(TASK=task))
        weights = {b.name: (b.loss_weights["init"], b.loss_weights["refine"]) for b in branches}
        assert weights == expected

    def test_joint_takes_sizes_and_weights_from_the_config(self):
        extreme, contour, keypoint = build_branches(
            tiny_cfg(
                TASK="joint",
                BRANCHES=["extreme", "contour", "keypoint"],
                NUM_CONTOUR_POINTS=24,
                NUM_KEYPOINTS=13,
                INIT_LOSS_WEIGHTS=[0.5, 1.0, 2.0],
            )
        )
        assert (extreme.num_landmarks, contour.num_landmarks, keypoint.num_landmarks) == (4, 24, 13)
        assert keypoint.loss_weights == {"init": 2.0, "refine": 2.0, "polish": 0.5}

    def test_unlabelled_poses_need_boxes(self):
        with pytest.raises(ValueError, match="TRAIN_UNLABELLED_POSES"):
            build_branches(tiny_cfg(TASK="pose_kbox", TRAIN_UNLABELLED_POSES=True))

    def test_one_keypoint_spans_no_box(self):
        with pytest.raises(ValueError, match="NUM_KEYPOINTS is 1,"):
            build_branches(tiny_cfg(TASK="pose_kbox", NUM_KEYPOINTS=1))
        build_branches(tiny_cfg(TASK="pose_bbox", NUM_KEYPOINTS=1))

    @pytest.mark.parametrize("classes", [[3], [0, -1]])
    def test_classes_of_keypoints_are_classes(self, classes):
        with pytest.raises(ValueError, match=rf"KEYPOINT_CLASSES names \[{classes[-1]}\].* is 3$"):
            build_branches(tiny_cfg(TASK="pose_bbox", NUM_CLASSES=3, KEYPOINT_CLASSES=classes))
        build_branches(tiny_cfg(TASK="segm", NUM_CLASSES=3, KEYPOINT_CLASSES=classes))

    branches = build_branches(tiny_cfg(TASK="pose_bbox", KEYPOINT_CLASSES=[1]))
    assert branches[1].classes == [1]

    def test_unknown_task_names_the_key(self):
        with pytest.raises(ValueError, match=r"MODEL\.LSNET\.TASK is 'boxes'.*bbox"):
            build_branches(tiny_cfg(TASK="boxes"))

    @pytest.mark.parametrize("names", [[], ["extreme", "extreme"], ["masks"]])
    def test_unknown_branches_name_the_key(self, names):
        with pytest.raises(ValueError, match=r"MODEL\.LSNET\.BRANCHES"):
            build_branches(tiny_cfg(TASK="joint", BRANCHES=names))

    def test_number_of_weights_must_be_that_of_branches(self):
        with pytest.raises(ValueError, match=r"MODEL\.LSNET\.INIT_LOSS_WEIGHTS.*extreme"):
            build_branches(tiny_cfg(INIT_LOSS_WEIGHTS=[1.0, 2.0]))


def test_extreme_points_move_to_the_sides_of_boxes():
    branch = ExtremeBranch()
    points = torch.tensor([[[30.0, 10], [20, 15], [70, 90], [80, 40]]])  # top, left, bottom, right
    assert torch.equal(branch.moved_to_boxes(points, branch.boxes(points)), points)
    boxes = torch.tensor([[22.0, 18, 60, 99]])
    moved = branch.moved_to_boxes(points, boxes)
    assert moved.tolist() == [[[30, 18], [22, 18], [60, 99], [60, 40]]]
    assert torch.equal(branch.boxes(moved), boxes)
    assert branch.moved_to_boxes(points[:0], boxes[:0]).shape == (0, 4, 2)


@pytest.mark.parametrize(
    ("branch", "key", "mirrored"),
    [
        (ExtremeBranch(), "extremes", "extremes8"),
        (ContourBranch(), "polygons", "polygons"),
        (KeypointBranch(), "keypoints", "keypoints34"),
    ],
)
def test_order_in_a_mirrored_image_is_that_of_the_released_code(parity, branch, key, mirrored):
    recorded = Recorded("comp_flip.npz")
    points = recorded[key].float().unflatten(1, (-1, 3 if key == "keypoints" else 2))
    points = points[:, branch.flip_indices(["keypoints_coco_2017_val"]), :2]
    points[..., 0] = recorded["img_hw"][1] - points[..., 0]
    expected = recorded[f"test.horizontal.{mirrored}"].unflatten(1, (-1, 2))
    parity.absolute("landmarks of a mirrored image", points, expected, within=1e-4, unit="px")


@pytest.mark.parametrize(
    ("width", "height", "factor"),
    [(20, 20, 1), (40, 10, 100 * 17**0.5 / (32**0.5 * 40)), (100, 1, 4), (5, 5, 1)],
)
def test_errors_of_thin_contours_cost_more(width, height, factor):
    """Length times diagonal over area, relative to a square's, but no more than four times."""
    branch = ContourBranch(num_points=8)
    x = torch.tensor([0.5, 0, 0, 0, 0.5, 1, 1, 1]) * width
    y = torch.tensor([0, 0, 0.5, 1, 1, 1, 0.5, 0]) * height
    contour = torch.stack([x, y], dim=1)[None]
    targets = branch.targets(Instances((200, 200), gt_contours=contour))
    found = branch.displacement_loss(contour + 1, targets)
    plain = LandmarkBranch.displacement_loss(branch, contour + 1, targets)
    torch.testing.assert_close(found, factor * plain)

import pytest
import torch
from detectron2.structures import Boxes, Instances
from parity import Recorded, relative_difference
from tiny_model import tiny_cfg

from lsnet_d2.layers.deform_conv import tap_offsets
from lsnet_d2.modeling.landmarks import ExtremeBranch, LandmarkTargets, build_branches
from lsnet_d2.modeling.vectors import encode_vectors


def channels_last(recorded, key, width):
    """A recorded map (B, C, H, W) as (B, H, W, C / width, width)."""
    return recorded[key].unflatten(1, (-1, width)).permute(0, 3, 4, 1, 2)


class TestExtremeBranch:
    def test_sampling_points_are_those_of_the_released_code(self):
        recorded = Recorded("comp_head_decode.npz", "bbox.")
        vectors = channels_last(recorded, "softplus", 4)
        free = recorded["raw_init"][:, 20:].unflatten(1, (4, 2)).permute(0, 3, 4, 1, 2).flip(-1)
        points = ExtremeBranch().sampling_points(vectors, free)
        expected = channels_last(recorded, "kernel_points_yx", 2).flip(-1)
        assert relative_difference(points, expected) < 1e-6
        offsets = channels_last(recorded, "dcn_offset", 2).flip(-1)
        assert relative_difference(points - tap_offsets(3), offsets) < 1e-6

    def test_boxes_are_those_of_the_released_code(self):
        recorded = Recorded("comp_head_decode.npz", "bbox.")
        branch = ExtremeBranch()
        vectors = channels_last(recorded, "softplus", 4)
        origin = torch.zeros(*vectors.shape[:-2], 2)
        boxes = branch.boxes(branch.decode(vectors, origin, torch.ones(vectors.shape[:-2])))
        expected = recorded["boxes"].permute(0, 2, 3, 1)
        assert relative_difference(boxes, expected) < 1e-6

    def test_targets_end_with_the_centre_of_the_box(self):
        instances = Instances((100, 100))
        instances.gt_boxes = Boxes(torch.tensor([[10.0, 20.0, 30.0, 60.0]]))
        instances.gt_extreme_points = torch.arange(8.0).view(1, 4, 2)
        targets = ExtremeBranch().targets(instances)
        assert targets.points[0, :4].tolist() == torch.arange(8.0).view(4, 2).tolist()
        assert targets.points[0, 4].tolist() == [20.0, 40.0]

    def test_loss_of_a_perfect_prediction_is_zero_in_any_unit(self):
        branch = ExtremeBranch()
        landmarks = torch.tensor([[[20.0, 5.0], [5.0, 30.0], [25.0, 50.0], [40.0, 28.0]]])
        targets = LandmarkTargets(landmarks, branch.boxes(landmarks))
        anchors = torch.tensor([[16.0, 24.0]])
        vectors = encode_vectors(targets.points - anchors[:, None], branch.alpha)
        for unit in (1.0, 32.0):
            loss = branch.loss(vectors, targets, anchors, torch.tensor([unit]))
            assert loss.item() == pytest.approx(0, abs=1e-5)
        assert branch.loss(vectors * 1.5, targets, anchors, torch.tensor([32.0])).item() > 0.3

    def test_predictions_are_clipped_and_rescaled(self):
        instances = Instances((50, 100))
        landmarks = torch.tensor([[[20.0, -5.0], [5.0, 30.0], [25.0, 60.0], [140.0, 28.0]]])
        branch = ExtremeBranch()
        branch.add_predictions(instances, landmarks)
        clipped = [[20.0, 0.0], [5.0, 30.0], [25.0, 50.0], [100.0, 28.0]]
        assert instances.pred_extreme_points[0].tolist() == clipped
        larger = Instances((100, 300), pred_extreme_points=instances.pred_extreme_points)
        branch.rescale_predictions(larger, (3.0, 2.0))
        assert larger.pred_extreme_points[0].tolist() == [[3 * x, 2 * y] for x, y in clipped]


class TestBuildBranches:
    def test_task(self):
        (branch,) = build_branches(tiny_cfg(CROSS_IOU_ALPHA=0.3))
        assert isinstance(branch, ExtremeBranch) and branch.alpha == 0.3
        assert branch.num_vectors == 5 and branch.num_free_points == 4

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

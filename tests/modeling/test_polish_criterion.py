import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from detectron2.utils.events import EventStorage
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import make_input, tiny_model

from lsnet_d2.modeling.branches import ExtremeBranch, KeypointBranch
from lsnet_d2.modeling.head import HeadOutput
from lsnet_d2.modeling.landmarks import LandmarkTargets
from lsnet_d2.modeling.points import make_anchor_points
from lsnet_d2.modeling.polish import Polished
from lsnet_d2.modeling.polish_criterion import PolishCriterion, few_of_each
from lsnet_d2.modeling.samples import BranchSamples, GroundTruth
from lsnet_d2.modeling.vectors import encode_vectors


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 9))
def test_few_of_each_value(values, count):
    values = torch.tensor(values, dtype=torch.int64)
    kept = few_of_each(values, count)
    assert len(set(kept.tolist())) == len(kept)
    for value in values.unique():
        assert (values[kept] == value).sum() == min((values == value).sum(), count)


def test_few_of_each_value_at_random():
    torch.manual_seed(0)
    values = torch.tensor([7, 3, 7, 7, 3, 7])
    chosen = torch.stack([few_of_each(values, 1).sort().values for _ in range(1000)])
    counts = torch.bincount(chosen.flatten(), minlength=6)
    assert (counts[values == 7] - 250).abs().max() < 60
    assert (counts[values == 3] - 500).abs().max() < 70


class TestCall:
    """Two images; the second object, in the second image, has no keypoints."""

    INPUTS = (make_input([[10, 12, 60, 70]], [0]), make_input([[30, 40, 70, 90]], [1]))

    def losses(self, polish=None, inputs=INPUTS, **keys):
        model = tiny_model(TASK="pose_bbox", POLISH_IN_FEATURES=["p3"], **keys).train()
        inputs = copy.deepcopy(inputs)
        for image in inputs[1:]:
            image["instances"].gt_keypoints.tensor[..., 2] = 0
        if polish is not None:
            model.polish.forward = partial(polish, model.polish.forward)
        with EventStorage():
            losses = model(list(inputs))
            return losses, model.predict(model.preprocess_image(inputs).tensor)

    def test_the_third_stage_starts_from_the_landmarks_of_the_refine_stage(self):
        seen = []

        def polish(forward, fine, image, landmarks):
            seen.append((image, landmarks))
            return forward(fine, image, landmarks)

        _, (points, predictions, _) = self.losses(polish, POLISH_POSITIVES=1, POLISH_NEGATIVES=3)
        ((image, landmarks),) = seen
        # a positive of each object, and three hard negatives of each image
        assert image.tolist() == [0, 1, 0, 0, 0, 1, 1, 1]
        for i, branch in enumerate((ExtremeBranch(), KeypointBranch(num_keypoints=5))):
            for number, places in zip(image, landmarks[i], strict=True):
                everywhere = branch.decode(predictions.refine[i][number], points.xy, points.strides)
                assert (everywhere - places).abs().amax(dim=(1, 2)).min() < 1e-3

    @pytest.mark.parametrize("positives", [0, 1000])
    def test_objects_without_keypoints_do_not_dilute_those_of_others(self, positives):
        keys = {"POLISH_POSITIVES": positives, "POLISH_NEGATIVES": 0}
        both, _ = self.losses(**keys)
        alone, _ = self.losses(inputs=self.INPUTS[:1], **keys)
        torch.testing.assert_close(both["loss_pose_polish"], alone["loss_pose_polish"])
        assert both["loss_pose_quality"] < alone["loss_pose_quality"]  # of all points, a mean too


class TestLosses:
    """Two positives learn one object; a hard negative is taken for it, another one for none."""

    def setup_method(self):
        self.branch = ExtremeBranch(polish_weight=3.0)
        self.landmarks = torch.tensor([[[10.0, 0.0], [0.0, 20.0], [20.0, 40.0], [30.0, 10.0]]])
        self.start = self.landmarks + torch.tensor([0.0, 5.0])
        self.targets = LandmarkTargets.make(self.landmarks, self.branch.boxes(self.landmarks))

    def losses(self, objects, num_positives, steps, targets=None, draw=None):
        return PolishCriterion(quality_loss_weight=2.0, mask_loss_weight=5.0).branch_losses(
            self.branch,
            [Polished(*step, None, None) for step in steps],
            torch.tensor(objects),
            num_positives,
            self.targets if targets is None else targets,
            torch.tensor([1]),
            torch.tensor(2.0),
            torch.tensor(4.0),
            draw,
        )

    def test_places(self):
        """The second step puts one of the positives right."""
        found = self.start.expand(4, 4, 2)
        moved = torch.cat([self.landmarks, found[1:]])
        losses = self.losses([0, 0, 0, -1], 2, [(x, torch.zeros(4, 3)) for x in (found, moved)])
        # 5 pixels are a unit: top and bottom are off across their sides, left and right along them
        wrong = (1 + 1 + 0.25 + 0.25) / 4
        mean_of_steps = (2 * wrong + wrong) / 2
        assert losses["loss_bbox_polish"].item() == pytest.approx(3 * mean_of_steps / 2)
        # a logit of 0 loses ln 2, whatever the quality is: 2 positives, 2 negatives, 3 classes
        assert losses["loss_bbox_quality"].item() == pytest.approx(2 * 4 * 3 * math.log(2) / 4)

    def test_quality(self):
        """It is 1 for who is right, the IOU for the negative, 0 for other classes and no object."""
        iou = 35 / 45
        quality = torch.zeros(4, 3)
        quality[:, 1] = torch.tensor([1, iou, iou, 0])
        moved = torch.cat([self.landmarks, self.start.expand(3, 4, 2)])

        def loss(told):
            logits = told.clamp(1e-4, 1 - 1e-4).logit()
            return self.losses([0, 0, 0, -1], 2, [(moved, logits)])["loss_bbox_quality"].item()

        least = loss(quality)
        for sample in range(4):
            for of_class in range(3):
                for change in (-0.1, 0.1):
                    other = quality.clone()
                    other[sample, of_class] += change
                    if 0 <= other[sample, of_class] <= 1:
                        assert loss(other) > least + 1e-3

    def test_masks(self):
        """What the last step leads to is judged, also of negatives; positives learn."""

        class Masks:
            def iou(self, true):
                assert true.shape == (3, 4, 2)
                return torch.tensor([0.5, 0.25, 0.75])

            def __getitem__(self, positives):
                assert range(3)[positives] == range(2)
                return self

            def loss(self, true):
                assert true.shape == (2, 4, 2)
                return torch.tensor([1.0, 2.0])

        drawn = []

        def draw(at):
            drawn.append(at.tolist())
            return Masks()

        def loss(first, last):
            quality = torch.zeros(2, 4, 3)
            quality[0, :, 1], quality[1, :, 1] = torch.tensor([first, last])
            logits = quality.clamp(1e-4, 1 - 1e-4).logit()
            moved = self.landmarks.expand(4, 4, 2)
            return self.losses([0, 0, 0, -1], 2, [(moved, x) for x in logits], draw=draw)

        right = [1, 1, 1, 0], [0.5, 0.25, 0.75, 0]
        losses = loss(*right)
        assert losses["loss_bbox_mask"].item() == pytest.approx(5 * (1 + 2) / 2)
        assert drawn == [[0, 1, 2]]
        for wrong in ([right[1], right[1]], [right[0], right[0]]):
            assert loss(*wrong)["loss_bbox_quality"] > losses["loss_bbox_quality"] + 0.1

    def test_objects_from_which_a_branch_learns_nothing(self):
        """Of these only what is no object counts, the last candidate."""
        absent = replace(self.targets, present=torch.tensor([False]))
        step = (self.start.expand(4, 4, 2), torch.zeros(4, 3))
        losses = self.losses([0, 0, 0, -1], 2, [step], absent)
        assert losses["loss_bbox_polish"] == 0
        assert losses["loss_bbox_quality"].item() == pytest.approx(2 * 3 * math.log(2) / 4)

    def test_landmarks_that_nobody_has_placed(self):
        """An object that is learned from, of which no landmark is visible, as a vector to its
        centre: neither how far landmarks are off is known, nor how good they are."""
        unknown = replace(self.targets, visible=torch.zeros(1, 4, dtype=torch.bool))
        step = (self.start.expand(4, 4, 2), torch.zeros(4, 3))
        losses = self.losses([0, 0, 0, -1], 2, [step], unknown)
        assert losses["loss_bbox_polish"] == 0
        assert losses["loss_bbox_quality"].item() == pytest.approx(2 * 3 * math.log(2) / 4)

    def test_no_objects(self):
        none = self.targets[torch.tensor([], dtype=torch.int64)]
        found = self.start.expand(2, 4, 2)
        losses = self.losses([-1, -1], 0, [(found, torch.zeros(2, 3))], none)
        assert losses["loss_bbox_polish"] == 0
        assert losses["loss_bbox_quality"] > 0


class TestNegatives:
    def find(self, count):
        """In two images of 16 points with boxes of a cell: objects in the second alone."""
        points = make_anchor_points([(4, 4)], [8], torch.device("cpu"))
        branch = ExtremeBranch()
        scores = torch.zeros(2, 16, 2)
        scores[0, 3, 0], scores[0, 8, 1] = 3, 2
        scores[1, 5, 1], scores[1, 0, 0], scores[1, 15, 0], scores[1, 6, 0] = 4, 3, 2, 1
        background = torch.ones(2, 16, dtype=torch.bool)
        background[1, 5] = False
        offsets = torch.tensor([[0, -0.5], [-0.5, 0], [0, 0.5], [0.5, 0], [0, 0]])
        vectors = encode_vectors(offsets).expand(2, 16, 5, 4)
        boxes = torch.tensor([[-4.0, -4, 5, 5], [20.0, 20, 40, 40], [22, 22, 27, 27]])
        none = LandmarkTargets.make(torch.zeros(0, 4, 2), torch.zeros(0, 4))
        truth = GroundTruth(
            targets=[[none, LandmarkTargets.make(torch.zeros(3, 4, 2), boxes)]],
            classes=[],
            valid=background,
            ignored=~background,
            regions=[],
        )
        predictions = HeadOutput(scores, [vectors], [vectors], [(4, 4)])
        first = BranchSamples(branch, vectors[0], None, None)
        criterion = PolishCriterion(negatives=count)
        return criterion.find_negatives(points, predictions, first, background, truth)

    def test_highest_scores_of_the_background(self):
        found = self.find(2)
        assert found.image.tolist() == [0, 0, 1, 1]
        assert found.point.tolist() == [3, 8, 0, 15]
        # the box around the last point, (24, 24), is over two objects, more over the smaller
        assert found.object.tolist() == [-1, -1, 0, 2]

    def test_no_more_than_there_are(self):
        assert len(self.find(0)) == 0
        found = self.find(100)
        assert torch.bincount(found.image).tolist() == [16, 15]


def test_numbers_are_not_negative():
    for key in ("positives", "negatives"):
        with pytest.raises(ValueError, match=f"POLISH_{key.upper()} is -1"):
            PolishCriterion(**{key: -1})

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lsnet_d2.modeling.branches import ContourBranch, ExtremeBranch, KeypointBranch
from lsnet_d2.modeling.landmarks import LandmarkTargets, span_boxes

# 30 x 40 pixels, with a diagonal of 50: displacements count in units of 5 pixels
EXTREMES = torch.tensor([[[10.0, 0.0], [0.0, 20.0], [20.0, 40.0], [30.0, 10.0]]])
# A square of 10 pixels, its corners and the middles of its sides
SQUARE = 5.0 * torch.tensor(
    [[[0, 0], [1, 0], [2, 0], [2, 1], [2, 2], [1, 2], [0, 2], [0, 1]]], dtype=torch.float32
)


def targets(landmarks, **kwargs):
    return LandmarkTargets.make(landmarks, span_boxes(landmarks), **kwargs)


def moved(landmarks, index, x, y):
    landmarks = landmarks.clone()
    landmarks[:, index] += torch.tensor([x, y])
    return landmarks


def regular(sides, angle=0.0):
    turn = torch.arange(sides) * 2 * math.pi / sides + angle
    return torch.stack([turn.cos(), turn.sin()], dim=-1)[None]


class TestDisplacementLoss:
    def test_nothing_is_lost_at_the_right_places(self):
        assert ExtremeBranch().displacement_loss(EXTREMES, targets(EXTREMES)).tolist() == [0]

    @pytest.mark.parametrize(
        ("index", "x", "y", "loss"),
        [
            # of four points, in units of 5 pixels; sliding along a side costs a quarter
            (0, 0.0, 5.0, 1 / 4),
            (0, 5.0, 0.0, 1 / 16),
            (1, 5.0, 0.0, 1 / 4),
            (1, 0.0, 5.0, 1 / 16),
            (3, -2.5, 5.0, 1 / 8 + 1 / 16),
        ],
    )
    def test_extreme_points(self, index, x, y, loss):
        found = ExtremeBranch().displacement_loss(moved(EXTREMES, index, x, y), targets(EXTREMES))
        assert found.item() == pytest.approx(loss)

    def test_visible_keypoints_count_in_all_directions_alike(self):
        branch = KeypointBranch(num_keypoints=4)
        visible = torch.tensor([[True, True, True, False]])
        true = targets(EXTREMES, visible=visible)
        found = branch.displacement_loss(moved(EXTREMES, 1, 5.0, -2.5), true)
        assert found.item() == pytest.approx(1.5 / 3)
        assert branch.displacement_loss(moved(EXTREMES, 3, -5.0, 2.0), true).item() == 0
        invisible = targets(EXTREMES, visible=torch.zeros_like(visible))
        assert branch.displacement_loss(moved(EXTREMES, 1, 5.0, 0.0), invisible).item() == 0

    @pytest.mark.parametrize(
        ("index", "x", "y", "pixels"),
        [
            (1, 0.0, 1.0, 1.0),  # out of the side
            (1, 1.0, 0.0, 0.25),  # along it
            # at a right angle the chord is 1 / sqrt(2) of the edges
            (0, 0.5, 0.5, math.sqrt(0.5)),  # into the corner, across the chord
            (0, 0.5, -0.5, math.sqrt(0.5) * (1 - 0.75 * math.sqrt(0.5))),
        ],
    )
    def test_vertices_of_a_contour(self, index, x, y, pixels):
        branch = ContourBranch(num_points=8)
        unit = 0.1 * 10 * math.sqrt(2)
        found = branch.displacement_loss(moved(SQUARE, index, x, y), targets(SQUARE))
        # where the vertex enlarges the box, so does the unit
        assert found.item() == pytest.approx(pixels / unit / 8, rel=0.06)

    def test_what_is_predicted_far_too_large_has_its_own_unit(self):
        found = KeypointBranch(num_keypoints=4).displacement_loss(100 * EXTREMES, targets(EXTREMES))
        unit = 0.1 * 100 * 50
        assert found.item() == pytest.approx(99 * EXTREMES.sum(2).mean().item() / unit)

    def test_vertices_between_equal_ones_are_learned_in_all_directions(self):
        same = torch.full((1, 8, 2), 3.0)
        branch = ContourBranch(num_points=8)
        found = branch.displacement_loss(moved(same, 2, 0.3, -0.4), targets(same))
        # of eight vertices; a unit is a tenth of the least size, a pixel
        assert found.item() == pytest.approx(0.7 / 0.1 / 8)

    @given(
        scale=st.floats(1, 20),
        angle=st.floats(0, 2 * math.pi),
        shift=st.tuples(st.floats(-100, 100), st.floats(-100, 100)),
        seed=st.integers(0, 1000),
    )
    def test_contours_of_any_size_and_place(self, scale, angle, shift, seed):
        generator = torch.Generator().manual_seed(seed)
        # points on two circles about one centre, whose boxes have the same diagonal at any angle
        true = 10 * regular(36).double()
        found = true + torch.rand(1, 36, 2, generator=generator, dtype=torch.float64) - 0.5
        turn = torch.tensor(
            [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        ).double()
        branch = ContourBranch()
        losses = [
            branch.displacement_loss(p, targets(t)).item()
            for p, t in (
                (found, true),
                tuple(scale * x @ turn.T + torch.tensor(shift).double() for x in (found, true)),
            )
        ]
        assert losses[1] == pytest.approx(losses[0], rel=0.1)  # boxes change with the angle


class TestQuality:
    def test_of_boxes_is_their_iou(self):
        branch = ExtremeBranch()
        true = targets(EXTREMES)
        assert branch.quality(EXTREMES, true).item() == 1
        # 3 pixels lower: 37 rows of 43 in common
        assert branch.quality(EXTREMES + torch.tensor([0.0, 3.0]), true).item() == pytest.approx(
            37 / 43
        )
        assert branch.quality(-EXTREMES, true).item() == 0

    @pytest.mark.parametrize("sign", [1, -1])
    @pytest.mark.parametrize(("size", "iou"), [(10.0, 1.0), (11.0, 100 / 121), (9.0, 81 / 100)])
    def test_of_contours_is_near_the_iou(self, size, iou, sign):
        true = SQUARE - 5
        true = true if sign > 0 else true.flip(1)  # either direction
        found = ContourBranch(num_points=8).quality(true * size / 10, targets(true))
        # nearly a row of 48 more on either side of the square: 44 are enclosed where 43.2 should be
        assert found.item() == pytest.approx(iou, abs=0.031)

    def test_of_contours_that_slide_along_the_outline(self):
        true = 10 * regular(128)
        found = ContourBranch(num_points=128).quality(10 * regular(128, 0.01), targets(true))
        assert found.item() == pytest.approx(1, abs=2e-4)

    def test_of_contours_elsewhere_is_zero(self):
        assert ContourBranch(num_points=8).quality(SQUARE + 50, targets(SQUARE)).item() == 0

    def test_of_poses_is_the_similarity_of_visible_keypoints(self):
        branch = KeypointBranch(num_keypoints=4)
        true = targets(EXTREMES, visible=torch.tensor([[True, False, True, True]]))
        found = branch.quality(moved(moved(EXTREMES, 1, 9.0, 9.0), 0, 3.0, -4.0), true)
        similarity = math.exp(-(3**2 + 4**2) / (2 * (2 * 0.07) ** 2 * 30 * 40 / 2))
        assert found.item() == pytest.approx((similarity + 2) / 3)

import torch

from lsnet_d2.modeling.points import make_anchor_points, points_in_boxes, square_lattice


def test_points_lie_on_cell_corners():
    points = make_anchor_points([(2, 3), (1, 2)], [8, 16], torch.device("cpu"))
    assert points.xy.tolist() == [
        [0, 0], [8, 0], [16, 0], [0, 8], [8, 8], [16, 8], [0, 0], [16, 0]
    ]  # fmt: skip
    assert points.strides.tolist() == [8] * 6 + [16] * 2
    assert points.per_level == [6, 2]
    assert points.levels.tolist() == [0] * 6 + [1] * 2


def test_points_in_boxes():
    points = torch.tensor([[0.0, 0.0], [5.0, 5.0], [9.0, 1.0]])
    boxes = torch.tensor([[4.0, 4.0, 6.0, 6.0], [8.0, 0.0, 9.0, 9.0]])
    assert points_in_boxes(points, boxes).tolist() == [False, True, False]
    assert points_in_boxes(points, boxes[:0]).tolist() == [False] * 3


def test_square_lattice_goes_row_by_row():
    lattice = square_lattice(torch.tensor([-1, 4]))
    assert lattice.tolist() == [[-1, -1], [4, -1], [-1, 4], [4, 4]]
    assert square_lattice(torch.zeros(0)).shape == (0, 2)

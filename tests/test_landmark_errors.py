import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as mask_util

from lsnet_d2.errors import UserError
from lsnet_d2.ground_truth import coco_index
from lsnet_d2.landmark_errors import (
    Detections,
    TrueObject,
    contour_error,
    distance_to_outline,
    extreme_point_error,
    format_errors,
    keypoint_error,
    landmark_errors,
    match,
    sample_outline,
    summarize_errors,
)

SQUARE = np.array([[10, 10], [30, 10], [30, 30], [10, 30]], dtype=float)
NAMES = {3: "cat", 7: "dog"}


def annotation(box, category=3, **values):
    x, y, w, h = box
    outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    fixed = {"id": 5, "image_id": 1, "bbox": list(box), "category_id": category, "iscrowd": 0}
    return {**fixed, "segmentation": outline, **values}


def true_object(**values):
    return TrueObject(annotation((10, 10, 20, 20), **values), 60, 80)


def detections(boxes, scores, categories, image_id=1, **landmarks):
    boxes = np.array(boxes, dtype=float).reshape(-1, 4)
    return Detections(image_id, boxes, np.array(scores), np.array(categories), landmarks)


def coco(*annotations, images=1):
    return coco_index(
        {
            "images": [{"id": i + 1, "height": 60, "width": 80} for i in range(images)],
            "categories": [{"id": i, "name": name} for i, name in NAMES.items()],
            "annotations": list(annotations),
        }
    )


def test_distance_to_edges_and_corners():
    points = np.array([[20, 20], [20, 12], [0, 20], [33, 34], [10, 25]], dtype=float)
    # the last edge leads back to the first vertex
    assert distance_to_outline(points, [SQUARE]).tolist() == [10, 2, 10, 5, 0]
    assert distance_to_outline(points[2:3], [SQUARE, SQUARE - [10, 0]]).tolist() == [0]


def test_samples_go_round_all_parts():
    points = sample_outline([SQUARE, SQUARE + 100], 16)
    assert points[:3].tolist() == [[15, 10], [25, 10], [30, 15]]
    assert points[7].tolist() == [10, 15]
    assert points[8].tolist() == [115, 110]


def test_shifted_contour():
    # by 4 to the right: two vertices stick out by 4, two lie on edges
    there = (0 + 4 + 4 + 0) / 4
    # samples of the true outline are 1.25 apart, 0.625 from the corners. Left: 4 away, all 16;
    # above and below: three are left behind; right: inside, near the corners nearer to an edge.
    left = 16 * 4
    behind = 2 * (3.375 + 2.125 + 0.875)
    right = 10 * 4 + 2 * (0.625 + 1.875 + 3.125)
    back = (left + behind + right) / 64
    error = contour_error(SQUARE + [4, 0], true_object())
    assert error == pytest.approx((there + back) / 2)


def test_contour_around_one_part_of_two():
    two = true_object(segmentation=[SQUARE.ravel().tolist(), (SQUARE + [30, 0]).ravel().tolist()])
    # the way back sees the other part, of which the sides are 10, 20, 20 and 30 away in the mean
    assert contour_error(SQUARE, two) == pytest.approx((0 + (0 + 20) / 2) / 2)
    assert contour_error(SQUARE, true_object()) == pytest.approx(0)


def test_contour_error_sees_holes():
    mask = np.zeros((60, 80), np.uint8)
    mask[10:30, 10:30] = 1
    whole = mask_util.encode(np.asfortranarray(mask))
    mask[15:25, 15:25] = 0
    ring = mask_util.encode(np.asfortranarray(mask))
    assert contour_error(SQUARE, true_object(segmentation=whole)) == pytest.approx(0)
    # a third of the true outlines is 5 pixels away
    assert contour_error(SQUARE, true_object(segmentation=ring)) == pytest.approx(
        5 / 3 / 2, rel=0.05
    )


@given(st.integers(1, 5), st.integers(0, 3))
def test_contour_error_does_not_see_the_sampling(number, start):
    """Neither vertices amid edges nor the first vertex matter, of the true outline."""
    shares = np.arange(number)[:, None, None] / number
    edges = np.roll(SQUARE, -1, axis=0) - SQUARE
    fine = (SQUARE + shares * edges).transpose(1, 0, 2).reshape(-1, 2)
    rolled = np.roll(fine, start * number, axis=0)
    contour = SQUARE * 1.1 - 3
    error = contour_error(contour, true_object(segmentation=[rolled.ravel().tolist()]))
    assert error == pytest.approx(contour_error(contour, true_object()))


def test_extreme_points_of_a_rectangle_are_middles():
    points = np.array([[20, 10], [10, 20], [20, 30], [30, 20]], dtype=float)
    assert extreme_point_error(points, true_object()) == 0
    points[0] += [3, 4]
    assert extreme_point_error(points, true_object()) == 5 / 4


def test_labelled_keypoints():
    # the file has indices of pixels; hidden ones count, not labelled ones do not
    true = true_object(keypoints=[9.5, 9.5, 2, 19.5, 19.5, 1, 0, 0, 0])
    found = np.array([[10, 10, 0.9], [23, 24, 0.9], [70, 70, 0.9]])
    assert keypoint_error(found, true) == 2.5


def test_nothing_to_compare_with():
    box_only = true_object(segmentation=None)
    assert np.isnan(contour_error(SQUARE, box_only))
    assert np.isnan(extreme_point_error(SQUARE, box_only))
    assert np.isnan(keypoint_error(np.ones((3, 3)), true_object()))
    assert np.isnan(keypoint_error(np.ones((3, 3)), true_object(keypoints=[0] * 9)))


def test_masks_as_ground_truth():
    counts = [10 * 60 + 10] + [20, 40] * 19 + [20, 50 * 60 + 30]  # columns of 60
    true = true_object(segmentation={"size": [60, 80], "counts": counts})
    assert contour_error(SQUARE, true) == pytest.approx(0)
    true = true_object(segmentation={"size": [80, 60], "counts": counts})
    with pytest.raises(UserError, match=r"annotation 5 of image 1: an RLE of .* \[80, 60\]"):
        contour_error(SQUARE, true)


def test_matching():
    first, second = annotation((10, 10, 20, 20)), annotation((14, 10, 20, 20))
    other = annotation((50, 10, 20, 20), category=7)
    boxes = [(12, 10, 20, 20), (11, 10, 20, 20), (10, 10, 20, 20), (50, 10, 20, 20)]
    # the best score comes first, and takes what is nearest to it even if another is nearer to that
    found = detections(boxes, [0.5, 0.9, 0.8, 0.9], [3, 3, 3, 3])
    assert match(found, [first, second, other]) == [(1, first), (2, second)]
    assert match(found, [first]) == [(1, first)]
    # a class, a score or an overlap that will not do
    assert match(found, [other]) == []
    found = detections(boxes[:1], [0.29], [3])
    assert match(found, [first]) == []
    assert match(found, [first], score_floor=0.2) == [(0, first)]
    # 20 x 20 moved by 7: 13 / 27 = 0.48
    assert match(detections([(17, 10, 20, 20)], [0.9], [3]), [first]) == []
    assert match(detections([], [], []), [first]) == []


def test_errors_of_a_data_set():
    data = coco(
        annotation((10, 10, 20, 20)),
        annotation((40, 10, 20, 20), iscrowd=1),
        annotation((10, 10, 30, 30), 7, image_id=2),
        images=3,
    )
    points = np.array([[20, 10], [10, 20], [20, 30], [30, 20]], dtype=float)
    boxes = [(10, 10, 20, 20), (40, 10, 20, 20)]
    shifted = np.stack([points + [0, 2], points])
    errors = landmark_errors(
        data,
        [
            detections(boxes, [0.9, 0.9], [3, 3], pred_extreme_points=shifted),
            detections([(10, 10, 30, 30)], [0.9], [7], 2, pred_extreme_points=points[None] + 5),
            detections([], [], [], 3, pred_extreme_points=np.zeros((0, 4, 2))),
        ],
    )
    results = summarize_errors(errors, NAMES)
    # 2 pixels of 20. Of (25, 15), (15, 25), (25, 35), (35, 25) each is 5 away, of 30.
    assert results["extreme_points_px-cat"] == pytest.approx(2)
    assert results["extreme_points_pct-cat"] == pytest.approx(10)
    assert results["extreme_points_px-dog"] == pytest.approx(5)
    assert results["extreme_points_pct-dog"] == pytest.approx(100 / 6)
    assert results["extreme_points_px"] == pytest.approx(3.5)
    assert results["extreme_points_objects"] == 2 and results["extreme_points_objects-cat"] == 1
    table = format_errors(results, errors, NAMES.values())
    assert [line.split()[3] for line in table.splitlines()[2:]] == ["all", "cat", "dog"]
    assert table.splitlines()[3].split()[5:10:2] == ["2.00", "10.00", "1"]


def test_nothing_matched():
    found = detections([(50, 30, 9, 9)], [0.9], [3], pred_contours=SQUARE[None])
    results = summarize_errors(landmark_errors(coco(annotation((10, 10, 20, 20))), [found]), NAMES)
    assert sorted(results) == ["contour_objects", "contour_pct", "contour_px"]
    assert results["contour_objects"] == 0 and np.isnan(results["contour_px"])


def test_no_landmarks_no_errors():
    assert landmark_errors(coco(), [detections([(0, 0, 9, 9)], [0.9], [3])]) == {}

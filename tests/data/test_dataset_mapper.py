import copy
import logging

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from hypothesis import given
from hypothesis import strategies as st
from mapping import (
    DIAMOND,
    HEIGHT,
    OTHERS,
    SIDES,
    WIDTH,
    annotation,
    boxes_of,
    mapper,
    points_of,
    record,
    rle,
)
from pycocotools import mask as mask_util

from lsnet_d2 import add_lsnet_config
from lsnet_d2.data.annotation_checks import AnnotationError
from lsnet_d2.data.dataset_mapper import LSNetDatasetMapper
from lsnet_d2.data.images import ImageError
from lsnet_d2.data.polygons import polygons_to_rle
from lsnet_d2.errors import ConfigError


@pytest.fixture(autouse=True)
def _logs_reach_caplog(monkeypatch):
    # Detectron2's setup_logger, which other tests call, cuts the connection
    monkeypatch.setattr(logging.getLogger("lsnet_d2"), "propagate", True)


def uncompressed(mask):
    flat = mask.T.reshape(-1)
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *changes, flat.size]).tolist()
    return {"size": [HEIGHT, WIDTH], "counts": counts}


def test_plain(image):
    output = mapper()(record(image, annotation()))
    instances = output["instances"]
    assert instances.image_size == (HEIGHT, WIDTH)
    assert boxes_of(output) == [[20, 10, 60, 50]]
    assert instances.gt_classes.tolist() == [2]
    assert points_of(output) == [SIDES]
    assert instances.gt_extreme_points.dtype == torch.float32
    assert output["image"].shape == (3, HEIGHT, WIDTH) and output["image"].dtype == torch.uint8
    assert output["ignore_boxes"].shape == (0, 4)
    assert output["ignore_boxes"].dtype == torch.float32
    assert "annotations" not in output and output["image_id"] == 3


def test_flip(image):
    output = mapper(T.RandomFlip(prob=1.0))(record(image, annotation()))
    assert points_of(output) == [[[70, 10], [40, 35], [55, 50], [80, 25]]]
    assert boxes_of(output) == [[40, 10, 80, 50]]


def test_resize(image):
    output = mapper(T.Resize((120, 200)))(record(image, annotation()))
    np.testing.assert_allclose(points_of(output), 2 * np.array([SIDES]))


def test_boxes_and_classes_equal_detectron2s_without_crop_or_rotation(image):
    # a box that reaches over the border, one that does not fit its polygon, one without polygon
    annotations = [
        annotation(),
        annotation(bbox=(-4, 2, 30, 70), category_id=5),
        annotation(bbox=(1.5, 2.5, 40.25, 30), segmentation=None),
    ]
    augmentations = [T.Resize((90, 170)), T.RandomFlip(prob=1.0)]
    theirs = DatasetMapper(True, augmentations=augmentations, image_format="BGR")
    expected = theirs(record(image, *annotations))
    output = mapper(*augmentations)(record(image, *annotations))
    torch.testing.assert_close(
        output["instances"].gt_boxes.tensor, expected["instances"].gt_boxes.tensor
    )
    assert output["instances"].gt_classes.tolist() == expected["instances"].gt_classes.tolist()
    assert torch.equal(output["image"], expected["image"])


@pytest.mark.parametrize("encode", [rle, uncompressed])
def test_masks_of_both_codings_equal_the_polygon(image, encode):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[10:50, 20:60] = 1
    square = [20, 10, 60, 10, 60, 50, 20, 50]
    augmentations = T.RandomFlip(prob=1.0), T.Resize((90, 150))
    coded = mapper(*augmentations)(record(image, annotation(segmentation=encode(mask))))
    outlined = mapper(*augmentations)(record(image, annotation(segmentation=[square])))
    assert points_of(coded) == points_of(outlined)
    assert points_of(coded)[0] == [[90, 15], [60, 45], [90, 75], [120, 45]]


def test_crop_goes_by_what_is_visible(image):
    crop = T.CropTransform(40, 0, 30, HEIGHT)
    output = mapper(crop)(record(image, annotation()))
    # the edges from (30, 10) to (60, 35) and from (20, 25) to (45, 50) cross x = 40
    ((x0, y0, x1, y1),) = boxes_of(output)
    assert (x0, x1, y1) == (0, 20, 50) and y0 == pytest.approx(10 + 25 / 3, abs=1e-4)
    top, left, bottom, right = points_of(output)[0]
    assert top == pytest.approx([0, 10 + 25 / 3], abs=1e-4)
    assert left == pytest.approx([0, (10 + 25 / 3 + 45) / 2], abs=1e-4)
    assert bottom == [5, 50] and right == [20, 35]


def test_untouched_object_keeps_its_box_in_a_crop(image):
    loose = annotation(bbox=(18, 8, 44, 44))
    output = mapper(T.CropTransform(10, 5, 80, 50))(record(image, loose))
    assert boxes_of(output) == [[8, 3, 52, 47]]
    assert points_of(output)[0][0] == [20, 5]


def test_out_of_sight_is_dropped(image):
    crop = T.CropTransform(70, 0, 30, HEIGHT)
    away = annotation()
    boxed = annotation(segmentation=None)
    crowd = annotation(iscrowd=1)
    # its box reaches into the picture, the object itself does not
    hollow = annotation(
        bbox=(10, 0, 80, 60), segmentation=[[10, 0, 60, 0, 60, 10, 20, 10, 20, 60, 10, 60]]
    )
    seen = annotation(bbox=(75, 10, 10, 10), segmentation=None, category_id=1)
    output = mapper(crop)(record(image, away, boxed, crowd, hollow, seen))
    assert output["instances"].gt_classes.tolist() == [1]
    assert output["ignore_boxes"].shape == (0, 4)


def test_rotation_makes_the_box_tight(image):
    rotation = T.RotationTransform(HEIGHT, WIDTH, 45, expand=True)
    output = mapper(rotation)(record(image, annotation()))
    corners = rotation.apply_coords(np.array(SIDES, dtype=float))
    expected = [*corners.min(axis=0), *corners.max(axis=0)]
    np.testing.assert_allclose(boxes_of(output)[0], expected, atol=1e-3)
    top, left, bottom, right = points_of(output)[0]
    np.testing.assert_allclose([left[0], top[1], right[0], bottom[1]], expected, atol=1e-3)


@given(st.integers(0, 10_000))
def test_points_are_on_the_box_and_inside_under_any_augmentation(image, seed):
    rng = np.random.default_rng(seed)
    centre, angles = rng.uniform([0, 0], [WIDTH, HEIGHT]), np.linspace(0, 6.28, 9)[:-1]
    ring = centre + rng.uniform(5, 40, (8, 1)) * np.stack([np.cos(angles), np.sin(angles)], 1)
    x0, y0 = ring.min(axis=0)
    star = annotation((x0, y0, *np.ptp(ring, axis=0)), [ring.reshape(-1)])
    transforms = [
        T.RotationTransform(HEIGHT, WIDTH, float(rng.uniform(1, 359)), expand=False),
        T.CropTransform(int(rng.integers(0, 50)), int(rng.integers(0, 30)), 40, 25),
        T.HFlipTransform(40) if rng.random() < 0.5 else T.NoOpTransform(),
        T.ResizeTransform(25, 40, 50, 90),
    ]
    output = mapper(*transforms)(record(image, star))
    for box, points in zip(boxes_of(output), points_of(output), strict=True):
        top, left, bottom, right = points
        np.testing.assert_allclose([left[0], top[1], right[0], bottom[1]], box, atol=1e-3)
        assert min(box) >= 0 and box[2] <= 90 and box[3] <= 50
        for x, y in points:
            assert box[0] - 1e-3 <= x <= box[2] + 1e-3 and box[1] - 1e-3 <= y <= box[3] + 1e-3


def test_only_a_box_gives_midpoints_and_says_so_once(image, caplog):
    boxed = annotation(segmentation=None)
    flip = mapper(T.RandomFlip(prob=1.0))
    with caplog.at_level(logging.WARNING, logger="lsnet_d2"):
        output = flip(record(image, boxed, boxed, boxed))
        flip(record(image, boxed))
    assert points_of(output) == 3 * [[[60, 10], [40, 30], [60, 50], [80, 30]]]
    (said,) = [r.getMessage() for r in caplog.records if "only a box" in r.getMessage()]
    assert said.startswith("annotation 7 of image") and "image.png" in said


@pytest.mark.parametrize(
    "segmentation",
    [
        [],
        [[1, 2, 3, 4]],
        [[20, 10, 30, 20, 40, 30]],
        [[20, 10, float("nan"), 20, 40, 30]],
        {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]},
    ],
)
def test_unusable_segmentation_counts_as_none(image, segmentation):
    output = mapper()(record(image, annotation(segmentation=segmentation)))
    assert points_of(output) == [[[40, 10], [20, 30], [40, 50], [60, 30]]]


def test_unusable_parts_are_left_out(image):
    output = mapper()(record(image, annotation(segmentation=[[0, 0, 1, 1], DIAMOND])))
    assert points_of(output) == [SIDES]


def test_crowds_and_ignored_objects_become_regions(image):
    crowd = annotation(bbox=(0, 0, 30, 30), iscrowd=1, segmentation=rle(np.ones((HEIGHT, WIDTH))))
    ignored = annotation(bbox=(80, 40, 40, 40), ignore=1)
    output = mapper(T.RandomFlip(prob=1.0))(record(image, crowd, annotation(), ignored))
    assert output["ignore_boxes"].tolist() == [[70, 0, 100, 30], [0, 40, 20, 60]]
    assert len(output["instances"]) == 1


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_no_objects_have_all_fields(image, mask_format):
    empty = mapper(
        use_instance_mask=True,
        instance_mask_format=mask_format,
        use_keypoint=True,
        keypoint_hflip_indices=np.array([1, 0, 2]),
    )
    for source in (record(image), record(image, annotation(iscrowd=1))):
        instances = empty(source)["instances"]
        assert len(instances) == 0
        assert instances.gt_boxes.tensor.shape == (0, 4)
        assert instances.gt_classes.dtype == torch.int64
        assert instances.gt_extreme_points.shape == (0, 4, 2)
        assert instances.gt_keypoints.tensor.shape == (0, 3, 3)
        assert len(instances.gt_masks) == 0


def test_masks_and_keypoints(image):
    ring = np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.circle(ring, (40, 30), 18, 1, thickness=4)
    keypoints = [30.5, 10.5, 2, 40.5, 20.5, 1, 0.5, 0.5, 0]
    annotations = [
        annotation(keypoints=keypoints),
        annotation(segmentation=rle(ring)),
        annotation(segmentation=None),
    ]
    full = mapper(
        T.RandomFlip(prob=1.0),
        use_instance_mask=True,
        instance_mask_format="bitmask",
        use_keypoint=True,
        keypoint_hflip_indices=np.array([1, 0, 2]),
    )
    instances = full(record(image, *annotations))["instances"]
    masks = instances.gt_masks.tensor.numpy()
    np.testing.assert_array_equal(masks[1], ring[:, ::-1] == 1)  # with its hole
    assert masks[2].sum() == 40 * 40 and masks[2][30, 60] and not masks[2][30, 39]
    assert instances.gt_keypoints.tensor[0].tolist() == [
        [59.5, 20.5, 1],
        [69.5, 10.5, 2],
        [0, 0, 0],
    ]
    assert not instances.gt_keypoints.tensor[1:].any()


def test_malformed_mask_names_the_annotation(image):
    with pytest.raises(AnnotationError, match="annotation 7 of image .*image.png: an RLE of"):
        mapper()(record(image, annotation(segmentation={"size": [5, 5], "counts": [25]})))


def test_changes_nothing_of_its_input(image):
    source = record(
        image,
        annotation(segmentation=[np.array(DIAMOND, dtype=float)], keypoints=[30.5, 10.5, 2]),
        annotation(extreme_points=[list(map(float, p)) for p in OTHERS], segmentation=None),
        annotation(iscrowd=1),
    )
    source["annotations"][0]["segmentation"] = [np.array(DIAMOND, dtype=float)]
    source["annotations"][0]["keypoints"] = np.array([30.5, 10.5, 2])
    source["annotations"][1]["extreme_points"] = np.array(OTHERS, dtype=float)
    before = copy.deepcopy(source)
    full = mapper(
        T.RandomFlip(prob=1.0),
        T.CropTransform(10, 5, 60, 50),
        use_instance_mask=True,
        use_keypoint=True,
        keypoint_hflip_indices=np.array([0]),
    )
    full(source)
    np.testing.assert_equal(source, before)


def test_image_errors_name_the_file(image, tmp_path):
    with pytest.raises(ImageError, match="gone.png"):
        mapper()(record(str(tmp_path / "gone.png")))
    wrong = {**record(image), "height": 61}
    with pytest.raises(ImageError, match="image.png.*100, 60.*100, 61"):
        mapper()(wrong)
    with pytest.raises(ImageError, match="image.png: too narrow to be resized: .* 2 x 0"):
        mapper(T.CropTransform(0, 0, 100, 1), T.ResizeShortestEdge(10, 2))(record(image))


def test_inference_gives_the_image_only(image):
    infer = LSNetDatasetMapper(False, augmentations=[], image_format="BGR")
    output = infer(record(image, annotation()))
    assert sorted(output) == ["file_name", "height", "image", "image_id", "width"]


def test_from_config(image):
    cfg = get_cfg()
    add_lsnet_config(cfg)
    cfg.INPUT.MIN_SIZE_TRAIN = (120,)
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.INPUT.EXTREME_POINTS = "annotation"
    output = LSNetDatasetMapper(cfg, True)(record(image, annotation(extreme_points=OTHERS)))
    np.testing.assert_allclose(points_of(output), 2 * np.array([OTHERS]))
    cfg.INPUT.EXTREME_POINTS = "polygons"
    with pytest.raises(ConfigError, match="INPUT.EXTREME_POINTS is 'polygons'"):
        LSNetDatasetMapper(cfg, True)


def pose_cfg(**lsnet):
    cfg = get_cfg()
    add_lsnet_config(cfg)
    MetadataCatalog.get("mapper_joint").set(
        keypoint_names=["nose", "left", "right"], keypoint_flip_map=[("left", "right")]
    )
    cfg.DATASETS.TRAIN = ("mapper_joint",)
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.MODEL.LSNET.NUM_KEYPOINTS = 3
    for key, value in lsnet.items():
        cfg.MODEL.LSNET[key] = value
    return cfg


@pytest.mark.parametrize(
    ("task", "fields"),
    [
        ("bbox", {"gt_extreme_points"}),
        ("segm", {"gt_contours"}),
        ("pose_bbox", {"gt_extreme_points", "gt_keypoints"}),
        ("pose_kbox", {"gt_keypoints"}),
        ("joint", {"gt_extreme_points", "gt_contours", "gt_keypoints"}),
    ],
)
def test_a_task_gets_the_fields_of_its_branches(image, task, fields):
    cfg = pose_cfg(TASK=task, BRANCHES=["extreme", "contour", "keypoint"], NUM_CONTOUR_POINTS=16)
    instances = LSNetDatasetMapper(cfg, True)(record(image, annotation()))["instances"]
    assert set(instances.get_fields()) == {"gt_boxes", "gt_classes", *fields}


def test_contours_follow_the_augmentation_and_are_nan_without_a_mask(image):
    make = mapper(T.HFlipTransform(WIDTH), use_contour=True, num_contour_points=8)
    objects = make(record(image, annotation(), annotation(segmentation=None)))["instances"]
    contour = objects.gt_contours[0]
    assert objects.gt_contours.shape == (2, 8, 2)
    assert objects.gt_contours[1].isnan().all()
    # from the point nearest to the middle of the box's upper side on to the left, as without a flip
    middle = torch.tensor([WIDTH - 40.0, 10.0])
    assert (contour - middle).norm(dim=1).argmin() == 0
    low, high = contour.amin(dim=0).tolist(), contour.amax(dim=0).tolist()
    assert low == [WIDTH - 60, 10] and high == [WIDTH - 20, 50]
    assert contour[1, 0] < contour[0, 0] < contour[-1, 0]


def test_contour_of_a_mask_leaves_its_hole_open(image):
    ring = np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.circle(ring, (40, 30), 18, 1, thickness=6)
    make = mapper(T.HFlipTransform(WIDTH), use_contour=True, num_contour_points=72)
    objects = make(record(image, annotation(segmentation=rle(ring))))["instances"]
    (found,) = polygons_to_rle(objects.gt_contours.numpy(), HEIGHT, WIDTH)
    found, expected = mask_util.decode(found), ring[:, ::-1]
    assert not found[30, WIDTH - 40]
    assert (found & expected).sum() / (found | expected).sum() > 0.9


def test_unknown_contour_sampling_names_the_key(image):
    with pytest.raises(ConfigError, match=r"INPUT\.CONTOUR_SAMPLING is 'even'"):
        mapper(contour_sampling="even")

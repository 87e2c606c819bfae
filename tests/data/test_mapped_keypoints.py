import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from mapping import annotation, mapper, record
from parity import Recorded
from PIL import Image

from lsnet_d2 import add_lsnet_config
from lsnet_d2.data.annotation_checks import AnnotationError
from lsnet_d2.data.dataset_mapper import LSNetDatasetMapper


@pytest.mark.parametrize(
    ("flip", "places"),
    [
        (T.RandomFlip(prob=1.0, horizontal=True), [[59.5, 20.5], [69.5, 10.5]]),
        (T.RandomFlip(prob=1.0, horizontal=False, vertical=True), [[40.5, 39.5], [30.5, 49.5]]),
    ],
)
def test_left_and_right_change_places_in_flips_of_either_kind(image, flip, places):
    pose = mapper(flip, use_keypoint=True, keypoint_hflip_indices=np.array([1, 0, 2]))
    keypoints = [30.5, 10.5, 2, 40.5, 20.5, 1, 0.5, 0.5, 0]
    instances = pose(record(image, annotation(keypoints=keypoints)))["instances"]
    found = instances.gt_keypoints.tensor[0]
    assert found[:2, :2].tolist() == places
    assert found[:, 2].tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (T.CropTransform(40, 0, 30, 60), [[0, 0, 0], [5.5, 20.5, 1], [0, 0, 0]]),
        (T.Resize((120, 200)), [[61, 21, 2], [91, 41, 1], [191, 11, 2]]),
    ],
    ids=["crop", "resize"],
)
def test_keypoints_in_a_view_of_another_size(image, transform, expected):
    pose = mapper(transform, use_keypoint=True, keypoint_hflip_indices=np.arange(3))
    keypoints = [30.5, 10.5, 2, 45.5, 20.5, 1, 95.5, 5.5, 2]
    instances = pose(record(image, annotation(keypoints=keypoints)))["instances"]
    np.testing.assert_allclose(instances.gt_keypoints.tensor[0], expected)


@pytest.mark.parametrize("case", ["r0", "r1", "r2", "r3"])
def test_sizes_and_places_are_those_of_the_released_code(case, tmp_path):
    """But for keypoints that leave the image, which it moves to the border."""
    arrays = Recorded("comp_resize.npz").under(case)
    recorded = {name: arrays[name].numpy() for name in arrays}
    height, width = recorded["in_hw"].tolist()
    longest, shortest = recorded["img_scale"].tolist()
    Image.new("RGB", (width, height)).save(tmp_path / "a.png")
    annotations = [
        annotation(
            box,
            segmentation=None,
            bbox_mode=BoxMode.XYXY_ABS,
            keypoints=pose.tolist(),
            extreme_points=points.tolist(),
        )
        for box, pose, points in zip(
            recorded["boxes"], recorded["keypoints"], recorded["extremes"], strict=True
        )
    ]
    resize = mapper(
        T.ResizeShortestEdge(shortest, longest),
        use_keypoint=True,
        keypoint_hflip_indices=np.arange(17),
        extreme_points="annotation",
    )
    output = resize(
        {
            **record(str(tmp_path / "a.png"), *annotations),
            **{"height": height, "width": width},
        }
    )
    assert list(output["image"].shape[1:]) == recorded["out_hw"].tolist()
    instances = output["instances"]
    np.testing.assert_allclose(instances.gt_boxes.tensor, recorded["out_boxes"], atol=1e-3)
    points = recorded["out_extremes"][:, :8].reshape(-1, 4, 2)
    np.testing.assert_allclose(instances.gt_extreme_points, points, atol=1e-3)
    expected = recorded["out_keypoints"].reshape(-1, 17, 3)
    found = instances.gt_keypoints.tensor.numpy()
    seen = found[..., 2] > 0
    assert seen.sum() > 0.9 * (expected[..., 2] > 0).sum()
    np.testing.assert_allclose(found[seen], expected[seen], atol=1e-3)


def test_keypoints_of_another_skeleton(image):
    pose = mapper(use_keypoint=True, keypoint_hflip_indices=np.array([0, 1, 2]))
    with pytest.raises(AnnotationError, match="annotation 7 of image .*image.png: 6 numbers"):
        pose(record(image, annotation(keypoints=[1, 2, 2, 3, 4, 2])))


def test_from_config_with_crop_and_keypoints(image):
    cfg = get_cfg()
    add_lsnet_config(cfg)
    MetadataCatalog.get("mapper_pose").set(
        keypoint_names=["nose", "left", "right"], keypoint_flip_map=[("left", "right")]
    )
    cfg.DATASETS.TRAIN = ("mapper_pose",)
    cfg.MODEL.MASK_ON = cfg.MODEL.KEYPOINT_ON = cfg.INPUT.CROP.ENABLED = True
    instances = LSNetDatasetMapper(cfg, True)(record(image, annotation()))["instances"]
    assert instances.gt_keypoints.tensor.shape[1:] == (3, 3)
    assert len(instances.gt_masks) == len(instances.gt_extreme_points) == len(instances)

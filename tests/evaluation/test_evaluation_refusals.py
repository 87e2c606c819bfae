"""What evaluation refuses, and what it says then."""

import numpy as np
import pytest
import tiny_coco
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from tiny_coco import change_annotations, registered_cfg
from tiny_evaluation import add_keypoints, evaluate_tasks, predictions

from lsnet_d2.errors import ConfigError, UserError
from lsnet_d2.evaluation import build_evaluator


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.pop("categories"), "'categories' is missing or empty"),
        (lambda d: d.update(images=[]), "'images' is missing or empty"),
        (lambda d: d["annotations"][1].pop("bbox"), "entry 2 of 'annotations' has no 'bbox'"),
        (lambda d: d["annotations"][1].pop("id"), "entry number 1 of 'annotations' has no 'id'"),
        (lambda d: d["annotations"][1].update(bbox=[1, 2, 3]), "annotation 2 of image 2: its box"),
        (
            lambda d: d["annotations"][1].update(segmentation=[[1, None, 3, 4, 5, 6]]),
            "annotation 2 of image 2: a polygon with a coordinate that is no finite number",
        ),
    ],
)
def test_unusable_ground_truth(coco, change, message):
    with tiny_coco.edited(coco, "val") as dataset:
        change(dataset)
    with pytest.raises(UserError, match=f"instances_val2017.json: (a problem:\n  )?{message}"):
        build_evaluator(registered_cfg(coco), "tiny_val")


def test_missing_or_truncated_file(coco):
    path = tiny_coco.json_file(coco, "val")
    path.write_text(path.read_text()[:100])
    with pytest.raises(UserError, match="not a complete JSON file"):
        build_evaluator(registered_cfg(coco), "tiny_val")
    path.unlink()
    with pytest.raises(UserError, match="no such annotation file"):
        build_evaluator(registered_cfg(coco), "tiny_val")


def test_class_count_must_agree(coco):
    DatasetCatalog.get("tiny_val")
    cfg = registered_cfg(coco, "MODEL.RETINANET.NUM_CLASSES", "3")
    message = "tiny_val .* has 80 classes .* MODEL.RETINANET.NUM_CLASSES is 3: set it to 80"
    with pytest.raises(UserError, match=message):
        build_evaluator(cfg, "tiny_val")


@pytest.mark.parametrize(
    "metadata, config, source",
    [
        (None, [], "17 OKS sigmas, COCO's defaults"),
        ([0.1] * 4, [], "4 OKS sigmas, those of its metadata keypoint_oks_sigmas"),
        ([0.1] * 3, [0.1] * 5, "5 OKS sigmas, those of TEST.KEYPOINT_OKS_SIGMAS"),
    ],
)
def test_number_of_sigmas(coco, metadata, config, source):
    change_annotations(coco, "val", add_keypoints)
    if metadata:
        MetadataCatalog.get("tiny_val").keypoint_oks_sigmas = metadata
    cfg = registered_cfg(coco)
    cfg.TEST.KEYPOINT_OKS_SIGMAS = config
    build_evaluator(cfg, "tiny_val")  # a model without keypoints
    cfg.MODEL.KEYPOINT_ON = True
    message = f"data set tiny_val has 3 keypoints, but there are {source}: set TEST.KEYPOINT_OKS"
    with pytest.raises(ConfigError, match=message):
        build_evaluator(cfg, "tiny_val")


def test_number_of_keypoints_of_the_model(coco):
    """Before a training; sigmas may be an array, as pycocotools has them."""
    change_annotations(coco, "val", add_keypoints)
    MetadataCatalog.get("tiny_val").keypoint_oks_sigmas = np.full(3, 0.1)
    cfg = registered_cfg(coco, "MODEL.KEYPOINT_ON", "True")
    with pytest.raises(ConfigError, match="tiny_val has 3 keypoints, but the model 17"):
        build_evaluator(cfg, "tiny_val")
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 3
    assert build_evaluator(cfg, "tiny_val").num_keypoints == 3


def test_number_of_predicted_keypoints(coco):
    change_annotations(coco, "val", add_keypoints)
    output = predictions(1, pred_keypoints=torch.zeros(1, 17, 3))
    with pytest.raises(UserError, match="predicts 17 keypoints, data set tiny_val has 3, .* 3 OKS"):
        evaluate_tasks(coco, ("keypoints",), output, kpt_oks_sigmas=[0.1] * 3)


def test_numbers_of_keypoints_that_differ(coco):
    change_annotations(coco, "val", lambda a: a.update(keypoints=[1, 1, 2] * a["id"]))
    with pytest.raises(UserError, match="annotation 2 has 6 numbers .* annotation 1 has 3"):
        build_evaluator(registered_cfg(coco), "tiny_val")


def test_class_that_the_data_set_lacks(coco):
    image, output = predictions(1)
    output["instances"].pred_classes[:] = 80
    with pytest.raises(UserError, match="class 80, but data set tiny_val has classes 0 to 79"):
        evaluate_tasks(coco, ("bbox",), (image, output))

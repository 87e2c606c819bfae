import torch
from detectron2 import model_zoo
from detectron2.config import instantiate
from tiny_coco import ROOT

from lsnet_d2.config_file import load_config
from lsnet_d2.engine import LSNetTrainer

CONFIG = str(ROOT / "configs/quick/shapes_fcos.yaml")


def build(*opts):
    return LSNetTrainer.build_model(load_config(CONFIG, ["MODEL.DEVICE", "cpu", *opts]))


def test_defaults_are_those_of_the_model_zoo():
    theirs = instantiate(model_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.py").model)
    ours = build("MODEL.FCOS.SCORE_THRESH_TEST", "0.2")
    for name in (
        *("center_sampling_radius", "focal_loss_alpha", "focal_loss_gamma", "head_in_features"),
        *("test_score_thresh", "test_topk_candidates", "test_nms_thresh"),
        "max_detections_per_image",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.head.cls_score.bias.unique() == theirs.head.cls_score.bias.unique()
    assert (theirs.num_classes, len(theirs.head.cls_subnet)) == (80, 4 * 3)


def test_the_config_reaches_the_model():
    model = build("MODEL.FCOS.NUM_CONVS", "2", "MODEL.FCOS.NORM", "", "MODEL.FCOS.NUM_CLASSES", "9")
    assert model.num_classes == 9 and model.head.cls_score.out_channels == 9
    assert [type(layer).__name__ for layer in model.head.bbox_subnet] == 2 * ["Conv2d", "ReLU"]
    assert model.test_score_thresh == 0.05
    assert torch.equal(model.pixel_std.flatten(), torch.tensor([128.0, 128.0, 128.0]))

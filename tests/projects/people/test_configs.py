import pytest
from tiny_coco import ROOT

from lsnet_d2.config_file import load_config, num_classes

CONFIGS = sorted((ROOT / "projects/people/configs").glob("[a-z]*.yaml"))


def load(path):
    return load_config(str(path), ["MODEL.DEVICE", "cpu"], need_data_sets=False)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_only_the_model_differs(path):
    cfg, ours = load(path), load(ROOT / "projects/people/configs/people_joint.yaml")
    for key in ("PIXEL_MEAN", "PIXEL_STD", "BACKBONE", "WEIGHTS"):
        assert cfg.MODEL[key] == ours.MODEL[key]
    for key in ("OUT_CHANNELS", "NORM", "FUSE_TYPE"):
        assert cfg.MODEL.FPN[key] == ours.MODEL.FPN[key]
    assert cfg.SOLVER == ours.SOLVER
    masks = cfg.INPUT.pop("MASK_FORMAT"), ours.INPUT.pop("MASK_FORMAT")
    assert cfg.INPUT == ours.INPUT, masks
    assert cfg.DATALOADER == ours.DATALOADER
    assert cfg.DATASETS.INVALID_ANNOTATIONS == "drop"
    data = path.stem.partition("_")[0]
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST, cfg.OUTPUT_DIR]
    assert names == [f"{data}_train", f"{data}_val", f"output/{path.stem}"]
    assert num_classes(cfg) == {"people": 1, "fruits": 3}[data]


def test_people_have_17_keypoints():
    ours, theirs = (
        load(ROOT / f"projects/people/configs/people_{name}.yaml").MODEL
        for name in ("joint", "keypoint_rcnn")
    )
    assert ours.LSNET.NUM_KEYPOINTS == theirs.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS == 17
    assert theirs.KEYPOINT_ON and theirs.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE == 0

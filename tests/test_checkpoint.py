import json

import pytest
import torch
from parity import DIRECTORY, golden_weight
from tiny_model import tiny_cfg

from lsnet_d2.checkpoint import (
    convert_lsnet_checkpoint,
    is_released_checkpoint,
    rename_released_key,
)


@pytest.fixture(scope="module")
def released():
    names = json.loads((DIRECTORY / "bbox_r50.names.json").read_text())["state_dict"]
    return {name: torch.from_numpy(golden_weight(name, shape)) for name, shape in names.items()}


@pytest.fixture(scope="module")
def released_with_corners():
    names = json.loads((DIRECTORY / "bbox_cpv_r50.names.json").read_text())["state_dict"]
    return {name: torch.empty(shape) for name, shape in names.items()}


@pytest.fixture
def cfg():
    return tiny_cfg(NUM_CLASSES=80, REFERENCE_OFFSETS=True)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("backbone.conv1.weight", "backbone.bottom_up.stem.conv1.weight"),
        ("backbone.bn1.running_var", "backbone.bottom_up.stem.conv1.norm.running_var"),
        ("backbone.layer2.3.conv2.weight", "backbone.bottom_up.res3.3.conv2.weight"),
        ("backbone.layer4.0.bn3.bias", "backbone.bottom_up.res5.0.conv3.norm.bias"),
        ("backbone.layer1.0.downsample.0.weight", "backbone.bottom_up.res2.0.shortcut.weight"),
        ("backbone.layer1.0.downsample.1.bias", "backbone.bottom_up.res2.0.shortcut.norm.bias"),
        ("neck.lateral_convs.2.conv.weight", "backbone.fpn_lateral5.weight"),
        ("neck.fpn_convs.0.gn.bias", "backbone.fpn_output3.norm.bias"),
        ("neck.fpn_convs.4.gn.weight", "backbone.top_block.p7.norm.weight"),
        ("bbox_head.cls_convs.1.bn.weight", "head.cls_tower.1.1.weight"),
        (
            "bbox_head.bbox_convs.2.conv.conv_offset.bias",
            "head.branches.bbox.tower.2.0.conv_offset.bias",
        ),
        ("bbox_head.pose_convs.0.conv.weight", "head.branches.pose.tower.0.0.weight"),
        ("bbox_head.cls_af_dcn_conv.0.weight", "head.cls_predictor.fuse.weight"),
        ("bbox_head.segm_af_dcn_conv.0.bias", "head.branches.segm.refine.fuse.bias"),
        ("bbox_head.pts_segm_init_out.weight", "head.branches.segm.init_out.weight"),
        ("bbox_head.pts_bbox_refine_conv.weight", "head.branches.bbox.refine.sample.weight"),
        ("bbox_head.bbox_GN.weight", "head.branches.bbox.refine.norm.weight"),
        ("bbox_head.shared_convs.0.bn.bias", "head.corners.tower.0.1.bias"),
        (
            "bbox_head.shared_convs.0.conv.conv_offset.weight",
            "head.corners.tower.0.0.conv_offset.weight",
        ),
        ("bbox_head.reppoints_sem_out.bias", "head.corners.semantic.bias"),
        ("bbox_head.reppoints_sem_embedding.conv.weight", "head.corners.embedding.0.weight"),
        ("bbox_head.reppoints_sem_embedding.gn.bias", "head.corners.embedding.1.bias"),
        ("bbox_head.hem_tl.p1_conv1.conv.weight", "head.corners.top_left.pooled.0.0.weight"),
        ("bbox_head.hem_br.p2_conv1.gn.bias", "head.corners.bottom_right.pooled.1.1.bias"),
        ("bbox_head.hem_tl.p_conv1.weight", "head.corners.top_left.joined.0.weight"),
        ("bbox_head.hem_tl.p_gn1.weight", "head.corners.top_left.joined.1.weight"),
        ("bbox_head.hem_br.conv1.weight", "head.corners.bottom_right.direct.0.weight"),
        ("bbox_head.hem_br.gn1.bias", "head.corners.bottom_right.direct.1.bias"),
        ("bbox_head.hem_tl.conv2.gn.weight", "head.corners.top_left.fuse.1.weight"),
        ("bbox_head.reppoints_hem_br_score_out.bias", "head.corners.bottom_right.heat.bias"),
        ("bbox_head.reppoints_hem_tl_offset_out.weight", "head.corners.top_left.offset.weight"),
        ("optimizer.state", None),
    ],
)  # fmt: skip
def test_names(theirs, ours):
    assert rename_released_key(theirs) == ours


def test_every_weight_gets_a_name_of_its_own(released, cfg):
    converted = convert_lsnet_checkpoint(released, cfg)
    counters = [name for name in released if name.endswith("num_batches_tracked")]
    assert len(converted) == len(released) - len(counters)
    assert is_released_checkpoint(released) and not is_released_checkpoint(converted)


def test_every_weight_of_corner_verification_gets_a_name_of_its_own(released_with_corners, cfg):
    cfg.MODEL.LSNET.CPV = True
    converted = convert_lsnet_checkpoint(released_with_corners, cfg)
    counters = [name for name in released_with_corners if name.endswith("num_batches_tracked")]
    assert len(converted) == len(released_with_corners) - len(counters)


def test_corner_verification_must_be_that_of_the_checkpoint(released, released_with_corners, cfg):
    with pytest.raises(ValueError, match=r"has corner point.*MODEL\.LSNET\.CPV is False"):
        convert_lsnet_checkpoint(released_with_corners, cfg)
    cfg.MODEL.LSNET.CPV = True
    with pytest.raises(ValueError, match=r"has no corner point.*MODEL\.LSNET\.CPV is True"):
        convert_lsnet_checkpoint(released, cfg)


def test_left_over_keys_are_refused(released, cfg):
    with pytest.raises(ValueError, match=r"1 keys.*bbox_head\.mystery\.weight"):
        convert_lsnet_checkpoint({**released, "bbox_head.mystery.weight": torch.ones(1)}, cfg)


def test_another_number_of_classes_is_refused(released, cfg):
    cfg.MODEL.LSNET.NUM_CLASSES = 6
    with pytest.raises(ValueError, match=r"80 classes, but MODEL\.LSNET\.NUM_CLASSES is 6"):
        convert_lsnet_checkpoint(released, cfg)


def test_two_names_of_one_weight_are_refused(released, cfg):
    twice = {**released, "neck.lateral_convs.0.weight": torch.ones(64, 512, 1, 1)}
    with pytest.raises(ValueError, match=r"1 weights under two names: backbone\.fpn_lateral3\.w"):
        convert_lsnet_checkpoint(twice, cfg)


@pytest.mark.parametrize("bias", [torch.tensor(1.0), 80])
def test_classifier_must_be_one(released, cfg, bias):
    with pytest.raises(ValueError, match=r"bbox_head\.pts_cls_out\.bias has no value for each"):
        convert_lsnet_checkpoint({**released, "bbox_head.pts_cls_out.bias": bias}, cfg)


def test_missing_classifier_is_named(released, cfg):
    without = {name: v for name, v in released.items() if name != "bbox_head.pts_cls_out.bias"}
    with pytest.raises(ValueError, match=r"bbox_head\.pts_cls_out\.bias is missing"):
        convert_lsnet_checkpoint(without, cfg)


def test_another_task_is_refused(released, cfg):
    contours = {name.replace("bbox_", "segm_").replace("segm_head", "bbox_head"): value
                for name, value in released.items()}  # fmt: skip
    with pytest.raises(ValueError, match=r"branches \['segm'\].*TASK 'bbox'"):
        convert_lsnet_checkpoint(contours, cfg)


def test_reference_offsets_are_recommended(released, cfg, caplog):
    cfg.MODEL.LSNET.REFERENCE_OFFSETS = False
    convert_lsnet_checkpoint(released, cfg)
    assert "REFERENCE_OFFSETS True" in caplog.text

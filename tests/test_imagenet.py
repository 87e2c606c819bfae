import json
import pickle

import pytest
import torch
import torchvision
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from parity import DIRECTORY
from tiny_model import tiny_cfg

from lsnet_d2.checkpointer import LSNetCheckpointer
from lsnet_d2.errors import CheckpointError
from lsnet_d2.imagenet import (
    BACKBONE_PREFIX,
    convert_imagenet_weights,
    is_imagenet_checkpoint,
    rename_backbone_key,
)
from lsnet_d2.modeling.backbone import build_lsnet_res2net_backbone, build_lsnet_resnet_backbone

STAGES = ["res2", "res3", "res4", "res5"]


def make_cfg(**resnets):
    cfg = tiny_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_lsnet_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.NORM = "FixedBN"
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.OUT_FEATURES = STAGES
    cfg.MODEL.FPN.IN_FEATURES = STAGES[1:]
    cfg.MODEL.FPN.OUT_CHANNELS = 64
    for key, value in resnets.items():
        cfg.MODEL.RESNETS[key] = value
    return cfg


def without_prefix(weights):
    assert all(name.startswith(BACKBONE_PREFIX) for name in weights)
    return {name.removeprefix(BACKBONE_PREFIX): value for name, value in weights.items()}


def shapes(weights):
    return {name: tuple(value.shape) for name, value in weights.items()}


@pytest.mark.parametrize(
    ("key", "res2net", "name"),
    [
        ("conv1.weight", False, "stem.conv1.weight"),
        ("bn1.running_var", False, "stem.conv1.norm.running_var"),
        ("layer4.0.bn3.bias", False, "res5.0.conv3.norm.bias"),
        ("layer2.0.conv2.conv_offset.bias", False, "res3.0.conv2.conv_offset.bias"),
        ("layer1.0.downsample.0.weight", False, "res2.0.shortcut.weight"),
        ("layer1.0.downsample.1.weight", False, "res2.0.shortcut.norm.weight"),
        ("layer1.0.downsample.1.weight", True, "res2.0.shortcut.weight"),
        ("layer1.0.downsample.2.weight", True, "res2.0.shortcut.norm.weight"),
        ("stem.0.weight", True, "stem.conv1.weight"),
        ("stem.7.bias", True, "stem.conv3.norm.bias"),
        ("layer3.22.convs.2.conv_offset.weight", True, "res4.22.convs.2.conv_offset.weight"),
        ("layer3.22.bns.2.weight", True, "res4.22.convs.2.norm.weight"),
        ("layer3.22.bn1.weight", True, "res4.22.conv1.norm.weight"),
        ("stem.0.weight", False, None),
        ("fc.weight", False, None),
    ],
)
def test_names(key, res2net, name):
    assert rename_backbone_key(key, res2net=res2net) == name


def test_features_are_those_of_torchvision():
    torch.manual_seed(0)
    theirs = torchvision.models.resnext50_32x4d().eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
    assert is_imagenet_checkpoint(theirs.state_dict())
    ours = build_lsnet_resnet_backbone(
        make_cfg(NUM_GROUPS=32, WIDTH_PER_GROUP=4), ShapeSpec(channels=3)
    )
    ours.load_state_dict(without_prefix(convert_imagenet_weights(theirs.state_dict())), strict=True)
    image = x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        maps = ours(image)
        for layer in (theirs.conv1, theirs.bn1, theirs.relu, theirs.maxpool):
            x = layer(x)
        for i, name in enumerate(STAGES, start=1):
            x = getattr(theirs, f"layer{i}")(x)
            torch.testing.assert_close(maps[name], x, rtol=1e-4, atol=1e-4)


def test_weights_of_resnext101_64x4d():
    with torch.device("meta"):
        theirs = torchvision.models.resnext101_64x4d()
        ours = build_lsnet_resnet_backbone(
            make_cfg(DEPTH=101, NUM_GROUPS=64, WIDTH_PER_GROUP=4), ShapeSpec(channels=3)
        )
    converted = without_prefix(convert_imagenet_weights(theirs.state_dict()))
    assert shapes(converted) == shapes(ours.state_dict())


def test_weights_of_res2net101(caplog):
    """The file of mmcv has the names of the released model's backbone, and a classifier."""
    released = json.loads((DIRECTORY / "bbox_cpv_r2101_dcn.names.json").read_text())["state_dict"]
    theirs = {
        name.removeprefix("backbone."): torch.empty(shape, device="meta")
        for name, shape in released.items()
        if name.startswith("backbone.") and "conv_offset" not in name
    }
    classifier = {"fc.weight": torch.empty(1000, 2048), "fc.bias": torch.empty(1000)}
    with torch.device("meta"):
        ours = build_lsnet_res2net_backbone(
            make_cfg(DEPTH=101, WIDTH_PER_GROUP=26), ShapeSpec(channels=3)
        )
    with caplog.at_level("INFO", logger="lsnet_d2"):
        converted = without_prefix(convert_imagenet_weights({**theirs, **classifier}))
    assert shapes(converted) == shapes(ours.state_dict())
    assert "Left out the classifier of the ImageNet weights: fc.weight, fc.bias" in caplog.text


def test_unknown_layers_are_refused():
    weights = {"layer1.0.conv1.weight": torch.ones(1), "layer5.0.conv1.weight": torch.ones(1)}
    with pytest.raises(ValueError, match=r"1 weights are of no known layer: layer5\.0\.conv1"):
        convert_imagenet_weights(weights)


@pytest.fixture(scope="module")
def deformable_cfg():
    return make_cfg(DEFORM_ON_PER_STAGE=[False, True, True, True], DEFORM_MODULATED=True)


class TestCheckpointer:
    """Files given as MODEL.WEIGHTS of a model with deformable convolutions."""

    def test_torchvision(self, tmp_path, caplog, deformable_cfg):
        path = str(tmp_path / "resnet50.pth")
        theirs = torchvision.models.resnet50()
        torch.save(theirs.state_dict(), path)
        model = build_model(deformable_cfg)
        with caplog.at_level("WARNING"):
            LSNetCheckpointer(model, cfg=deformable_cfg).load(path)
        ours = model.backbone.bottom_up
        assert torch.equal(ours.res5[2].conv2.weight, theirs.layer4[2].conv2.weight)
        assert torch.equal(ours.res4[0].shortcut.norm.bias, theirs.layer3[0].downsample[1].bias)
        # what was not found is named, and of the backbone that is the offsets only
        text = caplog.text
        assert "not found in the checkpoint" in text and "head.cls_predictor" in text
        assert "res3.0.conv2.conv_offset" in text
        assert not any(
            "bottom_up" in line and "conv_offset" not in line for line in text.splitlines()
        )
        assert "not used by the model" not in text

    def test_detectron2(self, tmp_path, deformable_cfg):
        theirs = build_lsnet_resnet_backbone(make_cfg(), ShapeSpec(channels=3))
        weights = {name: value.numpy() for name, value in theirs.state_dict().items()}
        path = tmp_path / "R-50.pkl"
        data = {"model": weights, "__author__": "torchvision", "matching_heuristics": True}
        path.write_bytes(pickle.dumps(data))
        model = build_model(deformable_cfg)
        LSNetCheckpointer(model, cfg=deformable_cfg).load(str(path))
        ours = model.backbone.bottom_up.state_dict()
        assert all(torch.equal(ours[name], value) for name, value in theirs.state_dict().items())

    def test_left_over_weights_are_named(self, tmp_path, caplog, deformable_cfg):
        path = str(tmp_path / "resnet101.pth")
        with torch.device("meta"):
            deeper = torchvision.models.resnet101().state_dict()
        weights = {name: torch.zeros(value.shape) for name, value in deeper.items()}
        torch.save(weights, path)
        with caplog.at_level("WARNING"):
            LSNetCheckpointer(build_model(deformable_cfg), cfg=deformable_cfg).load(path)
        assert "not used by the model" in caplog.text
        assert "res4.22.conv3" in caplog.text

    def test_unknown_layers_name_the_file(self, tmp_path, deformable_cfg):
        path = str(tmp_path / "other.pth")
        torch.save({"layer1.0.conv1.weight": torch.ones(1), "mystery": torch.ones(1)}, path)
        with pytest.raises(CheckpointError, match=r"other\.pth: 1 weights .* mystery"):
            LSNetCheckpointer(build_model(deformable_cfg)).load(path)

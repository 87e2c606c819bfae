import json
import os
import re
import zlib

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from parity import CONFIG_FILES, DIRECTORY, golden_weight
from tiny_coco import ROOT, run_tool, run_tool_here

from lsnet_d2.checkpoint import convert_lsnet_checkpoint
from lsnet_d2.checkpointer import LSNetCheckpointer
from lsnet_d2.config_file import load_config


def config_file(case):
    return str(ROOT / "configs" / CONFIG_FILES[case])


def released(case, make=golden_weight):
    names = json.loads((DIRECTORY / f"{case}.names.json").read_text())["state_dict"]
    return {name: torch.as_tensor(make(name, shape)) for name, shape in names.items()}


def constants(name, shape):
    """Instant weights, different for each name."""
    return torch.full(shape, zlib.crc32(name.encode()) / 2**32)


@pytest.fixture(scope="module")
def bbox():
    return released("bbox_r50", constants)


def save(path, weights):
    """As mmdetection does."""
    torch.save({"meta": {"epoch": 12, "CLASSES": ("person",)}, "state_dict": weights}, path)
    return path


@pytest.mark.parametrize("case", CONFIG_FILES)
def test_all_tasks(tmp_path, monkeypatch, capsys, case):
    weights = released(case, constants)
    source, target = save(tmp_path / "released.pth", weights), tmp_path / "ours.pth"
    arguments = [source, target, "--config-file", config_file(case)]
    assert run_tool_here(monkeypatch, "convert_checkpoint.py", *arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    counters = sum(name.endswith("num_batches_tracked") for name in weights)
    assert lines[-1].endswith(
        f"ours.pth: {len(weights) - counters} weights, {counters} counters left out"
    )
    assert sum(line.startswith("left out") for line in lines) == counters
    assert sum(line.startswith("renamed") for line in lines) == len(weights) - counters

    cfg = load_config(config_file(case), ["MODEL.DEVICE", "cpu"])
    expected = convert_lsnet_checkpoint(weights, cfg)
    model = build_model(cfg)
    LSNetCheckpointer(model).load(str(target), strict=True)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.items())


def test_as_a_user_and_detectron2_do_it(tmp_path):
    weights = released("bbox_r50")
    source, target = save(tmp_path / "released.pth", weights), tmp_path / "ours.pth"
    arguments = [source, target, "--config-file", config_file("bbox_r50"), "--quiet"]
    result = run_tool("convert_checkpoint.py", *arguments)
    assert result.returncode == 0, result.stderr
    assert "REFERENCE_OFFSETS True" in result.stderr
    assert len(result.stdout.splitlines()) == 1

    model = build_model(load_config(config_file("bbox_r50"), ["MODEL.DEVICE", "cpu"]))
    DetectionCheckpointer(model).load(str(target))
    ours = model.backbone.bottom_up.res3[0].shortcut.weight
    assert torch.equal(ours, weights["backbone.layer2.0.downsample.0.weight"])

    result = run_tool("convert_checkpoint.py", *arguments)
    assert result.returncode == 2 and "give --overwrite" in result.stderr


@pytest.mark.parametrize(
    ("change", "line", "message"),
    [
        (
            {"bbox_head.mystery.weight": torch.ones(1)},
            "refused   bbox_head.mystery.weight  of no known layer",
            "1 keys .* have no counterpart",
        ),
        (
            {"backbone.layer4.3.conv1.weight": torch.ones(1)},
            "refused   backbone.layer4.3.conv1.weight  the model has no backbone.bottom_up.res5.3",
            "1 weights are refused and 0 are missing",
        ),
        (
            {"backbone.conv1.weight": None},
            "missing   backbone.bottom_up.stem.conv1.weight  in the checkpoint",
            "0 weights are refused and 1 are missing",
        ),
        (
            {"backbone.bn1.bias": torch.ones(3)},
            "refused   backbone.bn1.bias  [3], but backbone.bottom_up.stem.conv1.norm.bias is [64]",
            "1 weights are refused and 0 are missing",
        ),
        (
            {"neck.lateral_convs.0.weight": torch.ones(256, 512, 1, 1)},
            "refused   neck.lateral_convs.0.weight  there is another backbone.fpn_lateral3.weight",
            "1 weights under two names: backbone.fpn_lateral3.weight",
        ),
        (
            {"bbox_head.pts_cls_out.bias": torch.tensor(1.0)},
            "refused   bbox_head.pts_cls_out.bias  [], but head.cls_predictor.out.bias is [80]",
            "bbox_head.pts_cls_out.bias has no value for each class",
        ),
        (
            {"backbone.bn1.bias": "text"},
            "refused   backbone.bn1.bias  str, but",
            "1 weights are refused and 0 are missing",
        ),
    ],
)
def test_misfits_are_listed_and_nothing_is_written(
    tmp_path, monkeypatch, capsys, bbox, change, line, message
):
    weights = {name: value for name, value in {**bbox, **change}.items() if value is not None}
    source, target = save(tmp_path / "released.pth", weights), tmp_path / "ours.pth"
    arguments = [source, target, "--config-file", config_file("bbox_r50"), "--quiet"]
    assert run_tool_here(monkeypatch, "convert_checkpoint.py", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith(line) and len(captured.out.splitlines()) == 1
    assert re.search(message, captured.err)
    assert os.listdir(tmp_path) == ["released.pth"]


def test_another_task(tmp_path, monkeypatch, capsys, bbox):
    source, target = save(tmp_path / "released.pth", bbox), tmp_path / "ours.pth"
    arguments = [source, target, "--config-file", config_file("segm_r50")]
    assert run_tool_here(monkeypatch, "convert_checkpoint.py", *arguments) == 2
    captured = capsys.readouterr()
    assert "released.pth: the checkpoint has the landmark branches ['bbox']" in captured.err
    assert "refused   bbox_head.pts_bbox_init_out.weight  the model has no" in captured.out
    assert not target.exists()


class _Execute:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_files_are_data(tmp_path, monkeypatch, capsys):
    target = tmp_path / "executed"
    source = tmp_path / "evil.pth"
    torch.save({"state_dict": {"bbox_head.x": _Execute(str(target))}}, source)
    for file, message in (
        (source, "cannot read the weights"),
        (tmp_path / "absent.pth", "no such file of weights"),
        (save(tmp_path / "other.pth", {"x": torch.ones(1)}), "no checkpoint of the released"),
    ):
        arguments = [file, tmp_path / "ours.pth", "--config-file", config_file("bbox_r50")]
        assert run_tool_here(monkeypatch, "convert_checkpoint.py", *arguments) == 2
        assert message in capsys.readouterr().err
    assert not target.exists()

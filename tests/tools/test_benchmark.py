import json
import subprocess
import sys

import pytest
import torch
from benchmark_project import detectors, tool

from lsnet_d2.errors import UserError

RATIOS = {
    "inference/straight_port",
    "inference/retinanet",
    "inference_conv_tower/retinanet",
    "train_step/straight_port",
    "train_step/retinanet",
    "train_memory/retinanet",
    "rle/bitmaps",
    "mapper_bbox/mask_mapper",
    "mapper_segm/mask_mapper",
    "targets_1000/targets_10",
    "evaluation/pycocotools",
}
SECONDS = {"lsnet": 2.0, "lsnet_conv_tower": 1.5, "straight_port": 8.0, "retinanet": 4.0}
SETTINGS = {
    "models": list(SECONDS),
    "rounds": 3,
    "repeats": 1,
    "threads": 2,
    "size": [64, 96],
    "batch": 2,
    "train_size": [32, 48],
    "train_batch": 2,
    "device": "cpu",
    "precision": "float32",
    "config_file": "lsnet.yaml",
}


class Machine:
    """In place of :func:`measure`: a machine whose second round is ten times slower."""

    def __init__(self):
        self.calls = []

    def __call__(self, settings, kind, name):
        self.calls.append((kind, name))
        slow = 10 if self.calls.count((kind, name)) == 2 else 1
        if kind == "data":
            return {
                **{"rle": 0.1 * slow, "bitmaps": 1.0 * slow},
                **{"mask_mapper": 0.2, "mapper_bbox": 0.1, "mapper_segm": 0.3},
                **{"targets_10": 0.1, "targets_1000": 0.5, "targets_memory": 2e8},
                **{"evaluation": 1.0, "pycocotools": 8.0},
            }
        if kind == "exported":
            return {"onnx": 3.0 * slow, "pytorch": 2.0 * slow}
        value = SECONDS[name] * slow
        if kind == "training":
            return {"train_step": 3 * value, "train_memory": 1e9 * SECONDS[name]}
        figures = {"inference": value, "images_per_second": 1 / value, "detections": 100}
        stages = {"stages": {"backbone": value / 2, "towers": value / 2}}
        return figures | (stages if name == "lsnet" else {})


@pytest.fixture
def fake(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(tool, "measure", machine)
    return machine


def test_models_take_turns(fake):
    rounds = tool.run_rounds({**SETTINGS, "rounds": 2}, fake)
    names = list(SECONDS)
    one_round = [(kind, name) for kind in ("inference", "training") for name in names]
    rest = [("data", "data"), ("exported", "lsnet"), ("exported", "joint")]
    assert fake.calls == 2 * [*one_round, *rest]
    assert [list(figures) for figures in rounds] == 2 * [[*names, "data", "exported"]]


def test_a_slow_round_does_not_count(fake):
    summary = tool.summarize(tool.run_rounds(SETTINGS, fake))
    lsnet = summary["models"]["lsnet"]
    assert lsnet["inference"] == 2
    assert lsnet["stages"] == {"backbone": 1, "towers": 1}
    assert summary["data"]["rle"] == 0.1
    assert summary["ratios"]["inference/straight_port"] == 0.25
    assert summary["ratios"]["inference_conv_tower/retinanet"] == 0.375
    assert summary["ratios"]["train_memory/retinanet"] == 0.5
    assert summary["ratios"]["rle/bitmaps"] == pytest.approx(0.1)


def test_ratios_are_those_within_a_round():
    slower = [1.0, 5.0, 2.0]  # the machine, in three rounds
    other = [2.0, 2.5, 4.0]  # the model, beside ours
    figures = [
        {
            "lsnet": dict.fromkeys(tool.METRICS, pace),
            "retinanet": dict.fromkeys(tool.METRICS, pace * share),
            "data": {name: 1.0 for pair in tool.DATA_RATIOS for name in pair},
        }
        for pace, share in zip(slower, other, strict=True)
    ]
    # the ratio of the medians would be 2 / 8
    assert tool.summarize(figures)["ratios"]["inference/retinanet"] == 0.4


def test_models_that_were_left_out_have_no_ratios(fake):
    settings = {**SETTINGS, "models": ["straight_port", "lsnet_conv_tower"]}
    found = tool.summarize(tool.run_rounds(settings, fake))["ratios"]
    assert {name for name in found if "/straight_port" in name} == {
        f"{metric}_conv_tower/straight_port" for metric in tool.METRICS
    }
    assert not any("retinanet" in name or name.startswith("inference/") for name in found)


def test_report(fake, tmp_path):
    host = {"device": "Abacus", "torch": "2"}
    text = tool.write_report(tmp_path, SETTINGS, host, tool.run_rounds(SETTINGS, fake))
    content = json.loads((tmp_path / "bench.json").read_text())
    assert set(content) == {
        *("settings", "machine", "models", "data", "exported", "ratios", "rounds")
    }
    assert content["ratios"]["onnx/pytorch, joint"] == 1.5
    assert "| joint LSNet | 3 | 2 |" in text
    assert content["ratios"].keys() >= RATIOS
    assert content["settings"] == SETTINGS
    assert len(content["rounds"]) == 3
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "bench.md").read_text() == text
    assert "| RetinaNet | 4 | 0.25 | 12 | 4000 | 100 |" in text
    assert "| LSNet | 1.0000 | 1.0000 |" in text
    assert "| inference/straight_port | 0.25 |" in text
    assert "Targets of 1,000 objects take at most 200 MB more." in text
    assert "96 x 64; training 2 of 48 x 32; float32; Abacus, 2 threads, torch 2" in text


def test_the_command(fake, tmp_path, monkeypatch, capsys):
    arguments = ["--rounds", "1", "--models", "lsnet", "retinanet", "--size", "64", "96"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments, "--output", str(tmp_path / "b")])
    monkeypatch.setattr(tool.run_rounds, "__defaults__", (fake,))
    tool.main()
    assert "| inference/retinanet | 0.50 |" in capsys.readouterr().out
    content = json.loads((tmp_path / "b" / "bench.json").read_text())
    assert content["settings"]["models"] == ["lsnet", "retinanet"]
    assert content["settings"]["size"] == [64, 96]
    assert content["machine"]["cores"] >= 1


@pytest.mark.parametrize("flag", ["--rounds", "--threads", "--train-batch"])
def test_numbers_are_checked(flag, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", flag, "0", "--output", str(tmp_path)])
    with pytest.raises(SystemExit):
        tool.main()
    assert f"{flag}: must be 1 or more, not 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "device, message",
    [
        ("cuda", "'cuda', but there is none here"),
        ("cudda", "'cudda'; it must be auto or a device of torch"),
        ("meta", "--device is 'meta'; it must be cpu, cuda or auto"),
    ],
)
def test_the_device_is_checked(device, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "bench"
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--device", device, "--output", str(output)])
    with pytest.raises(SystemExit):
        tool.main()
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not output.exists()


def test_data_are_measured_on_the_cpu_alone(fake):
    settings = {**SETTINGS, "rounds": 1, "device": "cuda"}
    rounds = tool.run_rounds(settings, fake)
    assert ("data", "data") not in fake.calls
    summary = tool.summarize(rounds)
    assert summary["ratios"]["inference/retinanet"] == 0.5
    assert not summary["ratios"].keys() & {"rle/bitmaps", "targets_1000/targets_10"}
    assert "data and evaluation" not in tool.tables(summary)


def test_every_model_has_a_name():
    assert list(tool.MODELS) == list(detectors.DETECTORS)


def test_a_failing_process_names_its_model():
    with pytest.raises(
        UserError, match="Mask R-CNN, inference: ended with status 1: AttributeError"
    ):
        tool.measure({"threads": 1, "device": "cpu"}, "inference", "mask_rcnn")  # some are missing


def test_a_process_that_is_killed_names_its_model(monkeypatch):
    def run(command, **_):
        return subprocess.CompletedProcess(command, -9, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(UserError, match="FCOS, training: ended with status -9: it said nothing"):
        tool.measure(SETTINGS, "training", "fcos")


def test_figures_are_the_last_line(monkeypatch):
    runs = []

    def run(command, **options):
        runs.append((command, options["env"]))
        return subprocess.CompletedProcess(command, 0, stdout='noise\n{"x": 1}\n', stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    assert tool.measure(SETTINGS, "training", "fcos") == {"x": 1}
    ((command, env),) = runs
    assert command[1:4] == [str(tool.MEASURE), "training", "fcos"]
    assert json.loads(command[5]) == SETTINGS
    assert env["OMP_NUM_THREADS"] == "2"

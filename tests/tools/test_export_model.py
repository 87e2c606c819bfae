import json
import re
import runpy
import shlex
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny_coco import ROOT, make_finding_model, run_tool_here, tool_environment, write_config

import lsnet_d2.export
from lsnet_d2 import LSNetPredictor
from lsnet_d2.checkpointer import LSNetCheckpointer
from lsnet_d2.config_file import load_config
from lsnet_d2.description import describe_model
from lsnet_d2.export import DetectingModule

pytest.importorskip("onnxruntime")
data = pytest.importorskip("skimage.data")

PAGE = (ROOT / "docs" / "export.md").read_text()
CONFIG = """
_BASE_: "tiny.yaml"
MODEL: {LSNET: {PRIOR_PROB: 0.3, TOWER_CONV: "conv", SCORE_THRESH_TEST: 0.2}}
INPUT: {MIN_SIZE_TEST: 160, FORMAT: "BGR"}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As the page has it: a trained model in ``output/demo``, and ``photo.jpg``."""
    folder = tmp_path_factory.mktemp("export")
    demo = folder / "output" / "demo"
    demo.mkdir(parents=True)
    write_config(demo, "LSNet")
    (demo / "config.yaml").write_text(CONFIG)
    cfg = load_config(str(demo / "config.yaml"), ["MODEL.DEVICE", "cpu"])
    model = make_finding_model(cfg, seed=1)
    checkpointer = LSNetCheckpointer(model, str(demo), description=describe_model(cfg))
    checkpointer.save("model_final")
    Image.fromarray(data.cat()).save(folder / "photo.jpg", quality=95)
    for name in ("tools", "projects"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def commands(language):
    blocks = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return [block.replace("\\\n", " ") for block in blocks]


def run(folder, *arguments, stdout=subprocess.PIPE):
    return subprocess.run(
        [sys.executable, *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env=tool_environment(),
        cwd=folder,
        timeout=1200,
    )


@pytest.mark.slow
def test_commands_of_the_page(folder):
    lines = [shlex.split(line) for block in commands("bash") for line in block.splitlines()]
    exports = [line[1:] for line in lines if line[1:2] == ["tools/export_model.py"]]
    predictions = [line[1:] for line in lines if line[1:2] == ["projects/onnx/predict.py"]]
    assert (len(exports), len(predictions), len(lines)) == (3, 1, 5)

    result = run(folder, *exports[0])
    assert result.returncode == 0, result.stderr
    sizes = re.findall(r"(\d+) x (\d+): (\d+) detections", result.stdout)
    assert [size[:2] for size in sizes] == [("213", "160"), ("160", "213"), ("266", "200")]
    assert all(int(count) > 5 for _, _, count in sizes)
    predict_without_torch(folder, predictions[0])

    result = run(folder, *exports[1])
    assert result.returncode == 0, result.stderr
    assert "160 x 241: 20 detections" in result.stdout

    result = run(folder, *exports[2])
    assert result.returncode == 0, result.stderr
    (example,) = commands("python")
    result = run(folder, "-c", f"{example}\nprint(boxes.shape, extreme_points.shape)")
    assert re.match(r"torch.Size\(\[(\d+), 4\]\) torch.Size\(\[\1, 4, 2\]\)", result.stdout)


def predict_without_torch(folder, command):
    """The example's picture and JSON are those of the predictor."""
    *arguments, redirection, output = command
    assert redirection == ">"
    blocked = "sys.modules |= dict.fromkeys(['torch', 'detectron2', 'lsnet_d2'])"
    start = f"import runpy, sys; {blocked}; runpy.run_path(sys.argv[0], run_name='__main__')"
    start = f"import sys; sys.argv = sys.argv[1:]; {start}"
    with open(folder / output, "w") as file:
        result = run(folder, "-c", start, *arguments, stdout=file)
    assert result.returncode == 0, result.stderr
    found = json.loads((folder / output).read_text())
    demo = folder / "output" / "demo"
    predictor = LSNetPredictor(demo / "config.yaml", weights=demo / "model_final.pth", device="cpu")
    expected = predictor(folder / "photo.jpg")
    assert len(found) == len(expected) > 5
    scores = [thing["score"] for thing in found]
    np.testing.assert_allclose(scores, expected.scores, rtol=0, atol=1e-4)
    boxes = np.array([thing["box"] for thing in found])
    np.testing.assert_allclose(boxes, expected.pred_boxes.tensor, rtol=0, atol=0.05)
    points = np.array([thing["extreme_points"] for thing in found])
    np.testing.assert_allclose(points, expected.pred_extreme_points, rtol=0, atol=0.05)
    with Image.open(folder / "found.png") as picture, Image.open(folder / "photo.jpg") as photo:
        assert picture.size == photo.size
        assert (np.asarray(picture) != np.asarray(photo)).any() == (max(scores) > 0.5)


@pytest.fixture
def exported(monkeypatch):
    """An export that takes no time; ``exported.change`` is what the file does to its outputs."""

    class Exported:
        def change(self, outputs):
            return outputs

        def export(self, model, description):
            self.module, self.description = DetectingModule(model), description
            return b"a model"

        def load(self, content):
            assert content == b"a model"
            return lambda image: self.change([x.clone() for x in self.module(image)])

    exported = Exported()
    monkeypatch.setattr(lsnet_d2.export, "export_onnx", exported.export)
    monkeypatch.setattr(lsnet_d2.export, "load_onnx", exported.load)
    return exported


def export(monkeypatch, folder, *options, opts=(), config="config.yaml"):
    demo = folder / "output" / "demo"
    return run_tool_here(
        monkeypatch,
        "export_model.py",
        *["--config-file", demo / config, *options],
        *["MODEL.WEIGHTS", demo / "model_final.pth", *opts],
    )


def test_file_is_written_if_it_does_the_same(monkeypatch, tmp_path, folder, exported, capsys):
    output = tmp_path / "model.onnx"
    arguments = ["--output", output, "--check", folder / "photo.jpg"]
    assert export(monkeypatch, folder, *arguments) == 0
    assert output.read_bytes() == b"a model"
    assert len(json.loads(exported.description["class_names"])) == 80
    assert export(monkeypatch, folder, *arguments) == 2
    assert "exists: give --overwrite" in capsys.readouterr().err


def shift(outputs):
    outputs[3][0] += 0.1
    return outputs


def lower(outputs):
    outputs[1][0] -= 0.002
    return outputs


def drop(outputs):
    return [x[1:] for x in outputs]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shift, "213 x 160: extreme_points differ from the model's by 0.1"),
        (lower, "213 x 160: scores differ from the model's by 0.002"),
        (drop, "213 x 160: 1 detections are the file's or the model's only"),
    ],
)
def test_nothing_is_written_otherwise(
    monkeypatch, tmp_path, folder, exported, capsys, change, message
):
    exported.change = change
    assert export(monkeypatch, folder, "--output", tmp_path / "model.onnx") == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["TEST.AUG.ENABLED", "True"], "TEST.AUG.ENABLED is True: augmentation cannot be exported"),
        (
            ["MODEL.META_ARCHITECTURE", "RetinaNet"],
            "is RetinaNet; only LSNet can be exported",
        ),
    ],
)
def test_what_cannot_be_exported(monkeypatch, tmp_path, folder, capsys, opts, message):
    assert export(monkeypatch, folder, "--output", tmp_path / "model.onnx", opts=opts) == 2
    assert message in capsys.readouterr().err


def test_example_is_short():
    assert len((ROOT / "projects" / "onnx" / "predict.py").read_text().splitlines()) <= 60


class EmptySession:
    """Finds nothing, and keeps what it was given."""

    def __init__(self, **about):
        self.about = {"max_size": 400, "input_format": "RGB", **about}

    def get_modelmeta(self):
        values = {name: json.dumps(value) for name, value in self.about.items()}
        return SimpleNamespace(custom_metadata_map=values)

    def get_outputs(self):
        return []

    def run(self, _names, inputs):
        self.shape = inputs["image"].shape
        return []


@pytest.mark.parametrize(("size", "shape"), [(0, (3, 300, 500)), (150, (3, 150, 250))])
def test_example_resizes_as_the_file_says(size, shape):
    example = runpy.run_path(str(ROOT / "projects" / "onnx" / "predict.py"))
    session = EmptySession(min_size=size)
    assert example["predict"](session, Image.new("RGB", (500, 300))) == []
    assert session.shape == shape


class MaskSession(EmptySession):
    """Finds an object in the middle of an image, whose mask covers its left half."""

    def get_outputs(self):
        names = ("boxes", "scores", "classes", "masks", "mask_boxes", "contour_scores")
        return [SimpleNamespace(name=name) for name in names]

    def run(self, _names, _inputs):
        mask = np.zeros((1, 28, 28), np.float32)
        mask[:, :, :14] = 1
        values = [[[50, 30, 150, 120]], [0.9], [0], mask, [[[40, 20], [160, 140]]], [0.8]]
        return [np.array(x, np.float32 if i != 2 else np.int64) for i, x in enumerate(values)]


def test_example_draws_masks():
    example = runpy.run_path(str(ROOT / "projects" / "onnx" / "predict.py"))
    session = MaskSession(min_size=150, min_box_area=0, class_names=["pebble"])
    picture = Image.new("RGB", (500, 300))  # twice as large as what the model sees
    (found,) = example["predict"](session, picture)
    assert found["box"] == [100, 60, 300, 240]
    assert found["mask_boxes"] == [[80, 40], [320, 280]]
    assert np.shape(found["masks"]) == (28, 28) and "contours" not in found
    json.dumps(found)
    example["draw"](picture, [found])
    pixels = np.asarray(picture).any(2)
    # its left half is from 80 to 200, and all else that is drawn is the box and its label
    assert pixels[90:230, 82:198].all()
    assert not pixels[90:230, 203:298].any() and not pixels[:38].any() and not pixels[282:].any()

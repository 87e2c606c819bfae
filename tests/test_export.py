import io
import json

import numpy as np
import pytest
import torch
from benchmark_project import detectors
from detectron2.data import Metadata
from PIL import Image
from tiny_coco import ROOT
from tiny_model import tiny_cfg, tiny_model
from torch import nn
from torch.export import Dim

from lsnet_d2.errors import UserError
from lsnet_d2.export import (
    DetectingModule,
    compare,
    describe,
    export_onnx,
    export_program,
    load_onnx,
    load_program,
    onnx_translations,
)
from lsnet_d2.layers import ModulatedDeformConv, corner_pool
from lsnet_d2.layers.row_sum import RowIndex, weighted_row_sum
from lsnet_d2.modeling.postprocessing import select_detections

onnxruntime = pytest.importorskip("onnxruntime")
data = pytest.importorskip("skimage.data")

SIZES = [(200, 300), (333, 257), (130, 161)]
JOINT = {"TASK": "joint", "BRANCHES": ["extreme", "contour", "keypoint"], "KEYPOINT_CLASSES": [0]}
MODELS = {
    "bbox": {},
    "plain towers": {"TOWER_CONV": "conv"},
    "segm": {"TASK": "segm", "REFERENCE_OFFSETS": True},
    "pose_kbox": {"TASK": "pose_kbox"},
    "corner verification": {"CPV": True},
    "pose_bbox": {"TASK": "pose_bbox", "TOWER_CONV": "conv", "REFINE_SAMPLING": False},
    "joint, polished": {
        **{**JOINT, "TOWER_CONV": "conv", "POLISH_IN_FEATURES": ["p3", "p4"]},
        **{"KEYPOINT_SEARCH": True, "KEYPOINT_SEARCH_CONVS": 1, "POLISH_GRID": 2},
        **{"POLISH_STEPS": 2, "POLISH_REPEATS_TEST": 1, "SOFT_NMS_SIGMA_TEST": 1.0},
    },
    "joint, polished, traced": {
        **{**JOINT, "TOWER_CONV": "conv", "POLISH_IN_FEATURES": ["p3", "p4"], "TRACED_POINTS": 48}
    },
}
FAST = ["plain towers"]


def make_model(**lsnet):
    """A tiny model that finds much in anything, and landmarks far from one another."""
    model = tiny_model(PRIOR_PROB=0.2, NUM_CONVS=1, **lsnet).eval()
    # With other seeds a vector has equal components up to rounding, and points either way.
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.startswith(("head.", "polish.")):
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def noise(height, width):
    generator = torch.Generator().manual_seed(height)
    return torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)


@torch.no_grad()
def assert_same(model, run, image, places=1e-4, scores=1e-4, at_least=5):
    """
    Args:
        places: how far they may be from one another, relative to the image's longer side. Rounding
            grows on its way through random weights, on some processors more than on others. Masks
            depend on how far from contours places are.
    """
    module = DetectingModule(model)
    pixels = places * max(image.shape[1:])
    found = compare(module.output_names, module(image), run(image))
    assert found.count >= at_least and found.missing == 0
    for name, value in found.differences.items():
        most = 0.01 if name == "masks" else scores if name.endswith("scores") else pixels
        assert value <= most, (name, value)
    return found


def marked(models):
    return [
        pytest.param(lsnet, id=name, marks=[] if name in FAST else pytest.mark.slow)
        for name, lsnet in models.items()
    ]


@pytest.mark.parametrize("lsnet", marked(MODELS))
def test_onnx_finds_what_the_model_finds(lsnet):
    model = make_model(**lsnet)
    run = load_onnx(export_onnx(model, {}), threads=1)
    for size in [*SIZES, (40, 70)]:
        assert_same(model, run, noise(*size))
    # Nothing is found where no score is high enough: none of a black image is.
    assert all(len(x) > 0 for x in run(noise(64, 64)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "contours"),
    [("joint, polished", [(0, 36, 2)]), ("joint, polished, traced", [(0, 28, 28), (0, 2, 2)])],
)
def test_nothing_found(name, contours):
    model = make_model(**MODELS[name])
    image, black = noise(128, 160), torch.zeros(3, 128, 160, dtype=torch.uint8)
    model.test_quality_share = 0.0  # the threshold is one of the class's score
    module = DetectingModule(model)
    with torch.no_grad():
        model.test_score_thresh = 1.001 * module(black)[1].max().item()
        expected = module(image)
    assert len(expected[1]) > 0
    run = load_onnx(export_onnx(model, {}), threads=1)
    shapes = [x.shape for x in run(black)]
    assert shapes == [(0, 4), (0,), (0,), (0, 4, 2), *contours, (0,), (0, 5, 3), (0,)]
    assert_same(model, run, image, at_least=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["bbox", "corner verification", "joint, polished", "joint, polished, traced"]
)
def test_program_finds_what_the_model_finds(name):
    model = make_model(**MODELS[name])
    saved = export_program(model, {"min_size": "64"})
    run = load_program(saved)
    for size in SIZES:
        assert_same(model, run, noise(*size))
    files = {"description.json": ""}
    torch.export.load(io.BytesIO(saved), extra_files=files)
    assert json.loads(files["description.json"]) == {"min_size": "64"}


CONFIGS = {
    "configs/plus/shapes_joint.yaml": [(160, 160), (160, 213), (240, 160)],
    "configs/bbox/lsnet_R_50_FPN_1x.yaml": [(480, 480), (320, 481), (400, 266)],
    "configs/joint/lsnet_R_50_FPN_1x.yaml": [(480, 480), (320, 481), (400, 266)],
}


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_shipped_configs(config):
    """With random weights, made such that there is something to find, on photos."""
    first, *_ = images = [photo(i, size) for i, size in enumerate(CONFIGS[config])]
    model = detectors.build("lsnet", str(ROOT / config), {"image": first})
    run = load_onnx(export_onnx(model, {}), threads=1)
    for image in images:
        found = assert_same(model, run, image)
        print(config, tuple(image.shape), found)  # with -s, the differences of the documentation


def photo(number, size):
    """The astronaut or the cat, (3, H, W)."""
    image = Image.fromarray((data.astronaut, data.cat)[number % 2]())
    return torch.from_numpy(np.array(image.resize(size[::-1]))).permute(2, 0, 1).contiguous()


class Traced(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def through_onnx(function, *inputs, dynamic):
    """The outputs of a function of tensors after a translation; ``dynamic``: per input the
    dimensions that may vary."""
    program = torch.onnx.export(
        Traced(function).eval(),
        inputs,
        dynamic_shapes=(tuple(dict.fromkeys(d, Dim.DYNAMIC) for d in dynamic),),
        custom_translation_table=onnx_translations(),
        opset_version=20,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [x.name for x in session.get_inputs()]

    def run(*inputs):
        feed = dict(zip(names, (x.numpy() for x in inputs), strict=True))
        return [torch.from_numpy(x) for x in session.run(None, feed)]

    return run


class TestTranslations:
    def test_selection(self):
        """Among them inverted boxes, which overlap with none and are kept."""

        def select(boxes, scores):
            options = {"score_thresh": 0.3, "nms_thresh": 0.5, "max_detections": 20}
            return select_detections(boxes, scores, **options)

        def example(count, seed):
            generator = torch.Generator().manual_seed(seed)
            corner = 40 * torch.rand(count, 2, generator=generator)
            sides = 40 * torch.rand(count, 2, generator=generator) - 5
            scores = torch.rand(count, 4, generator=generator)
            return torch.cat([corner, corner + sides], dim=1), scores

        run = through_onnx(select, *example(30, 0), dynamic=[[0], [0]])
        for count in (30, 7, 200):
            boxes, scores = example(count, count)
            assert count < 30 or (boxes[:, 2:] < boxes[:, :2]).any()
            for actual, expected in zip(run(boxes, scores), select(boxes, scores), strict=True):
                assert torch.equal(actual, expected)
        assert [len(x) for x in run(boxes, 0.3 * scores)] == [0, 0, 0]

    @pytest.mark.parametrize("terms", [4, 36])
    def test_sums_of_rows(self, terms):
        def sums(table, rows, weights):
            return weighted_row_sum(table, RowIndex(rows, table.shape[0]), weights)

        def example(count, num_rows):
            rows = torch.randint(num_rows, (count, terms), dtype=torch.int32)
            return torch.randn(num_rows, 8), rows, torch.randn(count, terms)

        with torch.no_grad():
            run = through_onnx(sums, *example(5, 9), dynamic=[[0], [0], [0]])
            for sizes in [(5, 9), (17, 3), (0, 4)]:
                inputs = example(*sizes)
                torch.testing.assert_close(run(*inputs)[0], sums(*inputs))

    @pytest.mark.parametrize("side", ["top", "left", "bottom", "right"])
    def test_corner_pooling(self, side):
        def pool(x):
            return corner_pool(x, side)

        run = through_onnx(pool, torch.randn(1, 2, 5, 6), dynamic=[[2, 3]])
        for size in [(5, 6), (130, 3), (2, 67)]:
            x = torch.randn(1, 2, *size)
            assert torch.equal(run(x)[0], pool(x))

    def test_products_along_the_sources(self):
        run = through_onnx(lambda x: x.cumprod(1), torch.rand(5, 3, 2), dynamic=[[]])
        x = torch.rand(5, 3, 2)
        torch.testing.assert_close(run(x)[0], x.cumprod(1))

    def test_deformable_convolution(self):
        """Of stride 2 and in groups, as backbones have it."""
        conv = ModulatedDeformConv(8, 4, stride=2, groups=2).requires_grad_(False)
        conv.conv_offset.weight.normal_(std=0.3)
        run = through_onnx(conv, torch.randn(1, 8, 10, 12), dynamic=[[2, 3]])
        for size in [(10, 12), (7, 5)]:
            x = torch.randn(1, 8, *size)
            torch.testing.assert_close(run(x)[0], conv(x), rtol=0, atol=1e-4)


class TestComparison:
    NAMES = ("boxes", "scores", "classes")

    @staticmethod
    def detections(*rows):
        boxes = torch.tensor([row[:4] for row in rows], dtype=torch.float32).view(-1, 4)
        scores = torch.tensor([row[4] for row in rows])
        return boxes, scores, torch.tensor([row[5] for row in rows], dtype=torch.int64)

    FIRST, SECOND = (0, 0, 10, 10, 0.9, 1), (5, 5, 20, 20, 0.8, 2)

    def test_order_does_not_matter(self):
        one, other = self.detections(self.FIRST, self.SECOND), self.detections(*self.swapped())
        found = compare(self.NAMES, one, other)
        assert (found.count, found.missing) == (2, 0)
        assert found.differences == pytest.approx({"boxes": 0.5, "scores": 0, "classes": 0})

    def swapped(self):
        return self.SECOND, (0, 0.5, 10, 10, 0.9, 1)

    def test_missing_ones(self):
        one = self.detections(self.FIRST, self.SECOND)
        moved = self.detections(self.FIRST, (5, 5, 20, 22, 0.8, 2))
        found = compare(self.NAMES, one, moved)
        assert found.count == 1 and found.missing == 0  # both of the lowest score
        other_class = self.detections((0, 0, 10, 10, 0.9, 0), self.SECOND)
        found = compare(self.NAMES, one, other_class)
        assert found.count == 1 and found.missing == 2
        alone = self.detections(self.FIRST)
        moved = self.detections((0, 5, 10, 10, 0.9, 1))
        found = compare(self.NAMES, alone, moved)
        assert found.count == 0 and found.missing == 2  # although of the lowest score

    def test_nothing(self):
        nothing = self.detections()
        found = compare(self.NAMES, nothing, nothing)
        assert (found.count, found.missing) == (0, 0)
        found = compare(self.NAMES, nothing, self.detections(self.FIRST, self.SECOND))
        assert (found.count, found.missing) == (0, 2)


def test_description():
    cfg = tiny_cfg(**JOINT)
    bones = [("b", "a", (0, 0, 0))]
    known = Metadata(
        thing_classes=["x", "y", "z"], keypoint_names=["a", "b"], keypoint_connection_rules=bones
    )
    read = {name: json.loads(value) for name, value in describe(cfg, known).items()}
    assert read["class_names"] == ["x", "y", "z"]
    assert read["keypoint_names"] == ["a", "b"] and read["skeleton"] == [[1, 0]]
    assert (read["min_size"], read["max_size"], read["input_format"]) == (800, 1333, "BGR")
    assert (read["score_threshold"], read["nms_threshold"]) == (0.05, 0.6)
    unknown = {name: json.loads(value) for name, value in describe(cfg, None).items()}
    assert unknown["class_names"] == ["0", "1", "2"] and unknown["skeleton"] == []
    assert unknown["keypoint_names"] == ["0", "1", "2", "3", "4"]


def test_other_models_are_refused():
    with pytest.raises(UserError, match="only LSNet can be exported, not Linear"):
        DetectingModule(nn.Linear(1, 1))

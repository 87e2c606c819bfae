import cv2
import numpy as np
import pytest
import tiny_coco
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from own_data import KEYPOINTS, write_own_data
from PIL import Image

from lsnet_d2 import LSNetPredictor, Results
from lsnet_d2.checkpointer import LSNetCheckpointer
from lsnet_d2.config_file import load_config
from lsnet_d2.data.images import ImageError
from lsnet_d2.engine import LSNetTrainer
from lsnet_d2.errors import CheckpointError, ConfigError
from lsnet_d2.modeling import LSNetWithTTA
from lsnet_d2.modeling.test_time_augmentation import keep_image_sizes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Config, weights of a model that finds much in anything, and two images."""
    folder = tmp_path_factory.mktemp("predictor")
    opts = ["MODEL.DEVICE", "cpu", "MODEL.LSNET.PRIOR_PROB", "0.3"]
    cfg = load_config(str(tiny_coco.write_config(folder, "LSNet")), opts)
    model = tiny_coco.make_finding_model(cfg, seed=1)
    LSNetCheckpointer(model, str(folder)).save("weights")
    generator = np.random.default_rng(0)
    for name, size in (("wide.png", (60, 90, 3)), ("high.png", (80, 50, 3))):
        pixels = generator.integers(0, 255, size, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def predictor(folder, *opts, **options):
    cfg = load_config(str(folder / "tiny.yaml"), ["MODEL.DEVICE", "cpu", *opts])
    return LSNetPredictor(cfg, weights=folder / "weights.pth", device="cpu", **options)


def assert_same(actual, expected, atol=0.01):
    assert len(actual) == len(expected) > 5
    assert actual.image_size == expected.image_size
    torch.testing.assert_close(actual.scores, expected.scores, rtol=0, atol=1e-4)
    for field in ("pred_boxes", "pred_extreme_points"):
        values = [getattr(x.get(field), "tensor", x.get(field)) for x in (actual, expected)]
        torch.testing.assert_close(*values, rtol=0, atol=atol)


def test_all_kinds_of_images_give_the_same(folder):
    predict = predictor(folder)
    path = folder / "wide.png"
    expected = predict(path)
    assert expected.image_size == (60, 90)
    assert expected.pred_boxes.device.type == "cpu"
    with Image.open(path) as image:
        rgb = np.asarray(image)
        for same in (str(path), image, cv2.imread(str(path)), rgb[:, :, ::-1]):
            assert_same(predict(same), expected, atol=0)
    assert_same(predictor(folder, array_format="RGB")(rgb), expected, atol=0)
    assert not torch.equal(predict(rgb).scores, expected.scores)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_lists_give_lists_in_order(folder, batch_size):
    predict = predictor(folder, batch_size=batch_size)
    paths = [folder / name for name in ("wide.png", "wide.png", "wide.png", "high.png", "wide.png")]
    sizes = []
    predict.model.register_forward_pre_hook(lambda model, args: sizes.append(len(args[0])))
    results = predict(paths)
    assert sizes == [1] * 5 if batch_size == 1 else [2, 1, 1, 1]
    for path, result in zip(paths, results, strict=True):
        assert_same(result, predict(path))
    assert predict([]) == []


@pytest.fixture
def registered(folder):
    """The name of a data set of the two images."""
    images = [
        {"id": 1, "file_name": "wide.png", "height": 60, "width": 90},
        {"id": 2, "file_name": "high.png", "height": 80, "width": 50},
    ]
    DatasetCatalog.register(
        "two_images", lambda: [{**x, "file_name": str(folder / x["file_name"])} for x in images]
    )
    yield "two_images"
    DatasetCatalog.remove("two_images")
    MetadataCatalog.pop("two_images", None)


@pytest.mark.parametrize("augmented", [False, True])
def test_results_are_those_of_evaluation(folder, registered, augmented):
    opts = ["INPUT.MIN_SIZE_TEST", "70", "INPUT.MAX_SIZE_TEST", "100"]
    if augmented:
        opts += ["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(40, 96)"]
    predict = predictor(folder, *opts)
    assert isinstance(predict.model, LSNetWithTTA) == augmented
    cfg = keep_image_sizes(predict.cfg) if augmented else predict.cfg
    for inputs in LSNetTrainer.build_test_loader(cfg, registered):
        with torch.no_grad():
            (expected,) = predict.model(inputs)
        assert_same(predict(inputs[0]["file_name"]), expected["instances"], atol=0)


def test_augmentation_changes_something(folder):
    augmented = predictor(folder, "TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(40, 96)")
    image = folder / "wide.png"
    one, other = predictor(folder)(image), augmented(image)
    assert one.get_fields().keys() == other.get_fields().keys()
    assert len(one) != len(other) or not torch.allclose(one.scores, other.scores)


def test_results_know_their_data_set(folder, tmp_path):
    """The config's own files, which nothing has registered before."""
    own, images = write_own_data(tmp_path, "val", 1)
    config = tmp_path / "own.yaml"
    config.write_text(
        f"_BASE_: {folder / 'tiny.yaml'}\n"
        f"DATASETS: {{COCO_FILES: [[own_val, {own}, {images}]], TRAIN: [], TEST: [own_val]}}\n"
    )
    predict = LSNetPredictor(config, weights=folder / "weights.pth", device="cpu", score_thresh=0.0)
    assert predict.metadata.thing_classes == ["ball", "bird", "box"]
    assert predict.metadata.keypoint_names == KEYPOINTS
    path = folder / "wide.png"
    results, in_memory = predict([path, cv2.imread(str(path))])
    assert isinstance(results, Results) and results.metadata is predict.metadata
    assert (results.file_name, in_memory.file_name) == (str(path), None)
    birds = results[results.pred_classes == 1]
    assert {shape["label"] for shape in birds.to_labelme()["shapes"]} == {"bird"}
    assert {result["category_id"] for result in birds.to_coco(image_id=1)} == {20}
    drawn = in_memory.draw(cv2.imread(str(path)))
    np.testing.assert_array_equal(drawn, results.draw())
    DatasetCatalog.remove("own_val")
    MetadataCatalog.pop("own_val")


def test_threshold(folder):
    image = folder / "wide.png"
    everything = predictor(folder, score_thresh=0.0)(image)
    middle = everything.scores.median().item()
    above = predictor(folder, score_thresh=middle)(image)
    assert 0 < len(above) < len(everything) and above.scores.min() >= middle


def test_data_sets_need_not_be_here(folder, caplog):
    (folder / "elsewhere.yaml").write_text(
        "_BASE_: tiny.yaml\nDATASETS: {TRAIN: [absent_train], TEST: [absent_val]}\n"
    )
    config, weights = folder / "elsewhere.yaml", str(folder / "weights.pth")
    predict = LSNetPredictor(config, weights=weights, device="cpu")
    assert "No names of classes: data set 'absent_val' is not registered" in caplog.text
    assert len(predict(folder / "wide.png")) > 5
    MetadataCatalog.pop("absent_val")
    with pytest.raises(ConfigError, match="'absent_train' is not registered"):
        load_config(str(config))


def test_config_of_a_training_on_a_gpu(folder, monkeypatch):
    """A config.yaml that such a training has written, on a machine without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (folder / "gpu.yaml").write_text(
        "_BASE_: tiny.yaml\nMODEL: {DEVICE: cuda}\nSOLVER: {AMP: {ENABLED: True}}\n"
    )
    predict = LSNetPredictor(folder / "gpu.yaml", weights=folder / "weights.pth")
    assert predict.cfg.MODEL.DEVICE == "cpu"
    assert len(predict(folder / "wide.png")) > 5


def test_errors(folder):
    predict = predictor(folder)
    with pytest.raises(ImageError, match="absent.png: no such image file"):
        predict(folder / "absent.png")
    with pytest.raises(ImageError, match="image 1: an array of float32"):
        predict([folder / "wide.png", np.zeros((4, 5, 3), np.float32)])
    Image.new("RGB", (5000, 1)).save(folder / "strip.png")
    for opts in ((), ("TEST.AUG.ENABLED", "True", "TEST.AUG.MAX_SIZE", "1333")):
        with pytest.raises(ImageError, match="strip.png: too narrow to be resized: its 5000 x 1"):
            predictor(folder, *opts)(folder / "strip.png")
    with (
        Image.open(folder / "strip.png") as image,
        pytest.raises(ImageError, match="strip.png: too narrow"),
    ):
        predict(image)
    with pytest.raises(TypeError, match="image 0 is of type Tensor; it must be a path"):
        predict(torch.zeros(3, 4, 5))
    with pytest.raises(CheckpointError, match="MODEL.WEIGHTS is empty"):
        LSNetPredictor(folder / "tiny.yaml", device="cpu")
    with pytest.raises(ConfigError, match="no such config file: absent.yaml"):
        LSNetPredictor("absent.yaml", device="cpu")
    with pytest.raises(ConfigError, match="MODEL.DEVICE is 'gpu'"):
        predictor_on = load_config(str(folder / "tiny.yaml"))
        LSNetPredictor(predictor_on, weights=folder / "weights.pth", device="gpu")
    with pytest.raises(ConfigError, match="MODEL.LSNET.TASK is 'boxes'"):
        cfg = load_config(str(folder / "tiny.yaml"))
        cfg.MODEL.LSNET.TASK = "boxes"
        LSNetPredictor(cfg, weights=folder / "weights.pth", device="cpu")
    with pytest.raises(ValueError, match="array_format is 'GRB'"):
        predictor(folder, array_format="GRB")
    with pytest.raises(ValueError, match="batch_size is 0"):
        predictor(folder, batch_size=0)


def test_the_config_is_left_as_it_is(folder):
    cfg = load_config(str(folder / "tiny.yaml"), ["MODEL.DEVICE", "cpu"])
    cfg.freeze()
    before = cfg.dump()
    LSNetPredictor(cfg, weights=folder / "weights.pth", device="cpu", score_thresh=0.01)
    assert cfg.dump() == before


def test_the_threshold_holds_for_fcos(tmp_path):
    """Which would drop all below 0.2 by itself."""
    config = str(tiny_coco.ROOT / "configs" / "quick" / "shapes_fcos.yaml")
    cfg = load_config(config, ["MODEL.DEVICE", "cpu"], need_data_sets=False)
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.2
    LSNetCheckpointer(build_model(cfg), str(tmp_path)).save("fcos")
    predict = LSNetPredictor(cfg, weights=tmp_path / "fcos.pth", device="cpu", score_thresh=0.05)
    assert predict.model.test_score_thresh == 0.05

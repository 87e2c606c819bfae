import json
import re
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import tiny_coco
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from own_data import CATEGORIES, KEYPOINTS, write_own_data
from PIL import Image

from lsnet_d2 import LSNetPredictor
from lsnet_d2.checkpointer import LSNetCheckpointer
from lsnet_d2.config_file import load_config
from lsnet_d2.data.coco_json import register_lsnet_instances
from lsnet_d2.description import KEY, describe_model, described_config, described_metadata
from lsnet_d2.errors import CheckpointError, ConfigError
from lsnet_d2.run_setup import setup

README = tiny_coco.ROOT / "README.md"
NAMES = [category["name"] for category in CATEGORIES]
IDS = {category["id"]: index for index, category in enumerate(CATEGORIES)}


@pytest.fixture
def own_data(tmp_path):
    """A registered data set of one's own, which has been read."""
    register_lsnet_instances("own", *write_own_data(tmp_path, "train", 1))
    DatasetCatalog.get("own")
    yield "own"
    DatasetCatalog.remove("own")
    MetadataCatalog.pop("own")


@pytest.fixture
def checkpoint(tmp_path, own_data):
    """What a training on the data set would leave."""
    opts = ["MODEL.DEVICE", "cpu", "MODEL.LSNET.PRIOR_PROB", "0.3"]
    cfg = load_config(str(tiny_coco.write_config(tmp_path, "LSNet")), opts)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (own_data,), ("elsewhere",)
    cfg.MODEL.LSNET.NUM_CLASSES = len(NAMES)
    cfg.MODEL.DEVICE, cfg.OUTPUT_DIR, cfg.SEED = "cuda", "elsewhere/out", 5
    description = describe_model(cfg)
    cfg.MODEL.DEVICE = "cpu"
    model = tiny_coco.make_finding_model(cfg, seed=1)
    LSNetCheckpointer(model, str(tmp_path), description=description).save("model")
    return tmp_path / "model.pth"


def test_a_checkpoint_is_all_that_a_predictor_needs(checkpoint, caplog):
    tiny = checkpoint.parent / "tiny.yaml"
    config = tiny.rename(checkpoint.parent / "gone.yaml")
    predict = LSNetPredictor(checkpoint)
    MetadataCatalog.pop("elsewhere", None)
    assert Path(predict.cfg.MODEL.WEIGHTS) == checkpoint
    assert predict.cfg.MODEL.LSNET.PRIOR_PROB == 0.3
    assert predict.metadata.thing_classes == NAMES
    assert predict.metadata.thing_dataset_id_to_contiguous_id == IDS
    assert predict.metadata.keypoint_names == KEYPOINTS
    assert predict.metadata.keypoint_flip_map == [
        ("left_wing", "right_wing"),
        ("left_foot", "right_foot"),
    ]
    assert "No names of classes" not in caplog.text
    results = predict(torch.randint(256, (60, 90, 3), dtype=torch.uint8).numpy())
    assert {result["category_id"] for result in results.to_coco(image_id=1)} <= set(IDS)
    labels = {shape["label"] for shape in results.to_labelme(image_path="a.png")["shapes"]}
    assert labels and labels <= set(NAMES)
    # the same with the config given: the names are still the checkpoint's
    config.write_text(config.read_text() + "DATASETS: {TEST: []}\n")
    opts = ["MODEL.LSNET.NUM_CLASSES", "3"]
    cfg = load_config(str(config), opts, need_data_sets=False)
    assert LSNetPredictor(cfg, weights=checkpoint).metadata.thing_classes == NAMES


def test_the_example_of_the_readme(checkpoint, tmp_path, monkeypatch):
    (code,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(), flags=re.M | re.S)
    (tmp_path / "output" / "demo").mkdir(parents=True)
    shutil.copy(checkpoint, tmp_path / "output" / "demo" / "model_final.pth")
    Image.effect_noise((90, 60), 100).convert("RGB").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(code, scope)
    assert len(scope["results"]) > 0
    with Image.open(tmp_path / "found.jpg") as picture:
        assert picture.size >= (90, 60)
    MetadataCatalog.pop("elsewhere", None)


def test_a_data_set_that_is_here_goes_before_what_the_checkpoint_says(checkpoint, tmp_path):
    """Its ids of categories are those that results are compared with."""
    path, images = write_own_data(tmp_path, "val", 1)
    text = path.read_text()
    for number in (10, 20, 40):
        text = text.replace(f'"id": {number}, "name"', f'"id": {number + 7}, "name"')
        text = text.replace(f'"category_id": {number},', f'"category_id": {number + 7},')
    path.write_text(text)
    register_lsnet_instances("elsewhere", path, images)
    predict = LSNetPredictor(checkpoint, device="cpu")
    ids = {number + 7: index for number, index in IDS.items()}
    assert predict.metadata.thing_dataset_id_to_contiguous_id == ids
    DatasetCatalog.remove("elsewhere")
    MetadataCatalog.pop("elsewhere")


def test_classes_of_a_file_that_has_changed_are_not_the_checkpoints(checkpoint, tmp_path, caplog):
    """A category was deleted since: all behind it would have the name of their neighbour."""
    path, images = write_own_data(tmp_path, "val", 1)
    data = json.loads(path.read_text())
    gone = data["categories"].pop(0)
    data["annotations"] = [a for a in data["annotations"] if a["category_id"] != gone["id"]]
    path.write_text(json.dumps(data))
    register_lsnet_instances("elsewhere", path, images)
    predict = LSNetPredictor(checkpoint, device="cpu")
    assert predict.metadata.thing_classes == NAMES
    assert predict.metadata.thing_dataset_id_to_contiguous_id == IDS
    assert "elsewhere has other classes than the checkpoint" in caplog.text
    DatasetCatalog.remove("elsewhere")
    MetadataCatalog.pop("elsewhere")


def test_names_and_ids_are_from_one_source(checkpoint):
    MetadataCatalog.get("elsewhere").set(thing_classes=["one", "other", "third"])
    predict = LSNetPredictor(checkpoint, device="cpu")
    assert predict.metadata.thing_classes == NAMES
    assert predict.metadata.thing_dataset_id_to_contiguous_id == IDS
    MetadataCatalog.pop("elsewhere")


def test_the_run_that_a_checkpoint_is_of_stays_behind(checkpoint, own_data, tmp_path, monkeypatch):
    """Another run neither writes into its folder nor repeats its seed."""
    assert "OUTPUT_DIR: elsewhere/out" in described_config(str(checkpoint))
    monkeypatch.chdir(tmp_path)
    args = Namespace(config_file=str(checkpoint), opts=["DATASETS.TEST", "()"], eval_only=True)
    cfg = setup(args)
    assert (cfg.OUTPUT_DIR, cfg.SEED) == ("./output", -1)
    assert cfg.MODEL.LSNET.NUM_CLASSES == 3
    assert (tmp_path / "output" / "config.yaml").is_file()


def test_options_go_before_the_config_of_a_checkpoint(checkpoint):
    opts = ["MODEL.WEIGHTS", "others.pth", "MODEL.LSNET.NMS_THRESH_TEST", "0.4"]
    cfg = load_config(str(checkpoint), opts, need_data_sets=False)
    assert (cfg.MODEL.WEIGHTS, cfg.MODEL.LSNET.NMS_THRESH_TEST) == ("others.pth", 0.4)
    assert cfg.MODEL.DEVICE in ("cpu", "cuda")  # of this machine


def test_a_description_is_plain_data_of_several_data_sets(own_data):
    MetadataCatalog.get("boxes").set(thing_classes=("a", "b"))
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("boxes", own_data)
    metadata = describe_model(cfg)["metadata"]
    assert metadata["thing_classes"] == ["a", "b"]
    assert metadata["keypoint_names"] == KEYPOINTS
    assert metadata["keypoint_connection_rules"][0][:2] == ("nose", "left_wing")
    assert described_metadata({KEY: {"metadata": metadata}}, "x") == metadata
    MetadataCatalog.pop("boxes")


@pytest.mark.parametrize(
    "description",
    ["text"]
    + [
        {"metadata": metadata}
        for metadata in (
            [],
            {"thing_classes": 3},
            {"thing_classes": "abc"},
            {"thing_dataset_id_to_contiguous_id": {float("inf"): 0}},
            {"keypoint_flip_map": [("a", "b", "c")]},
            {"keypoint_names": ["a"], "keypoint_connection_rules": [("a", "b", (1, 2, 3))]},
        )
    ],
)
def test_damaged_metadata(description):
    with pytest.raises(CheckpointError, match="a.pth: its description is damaged"):
        described_metadata({KEY: description}, "a.pth")


def test_a_checkpoint_of_others_has_no_description():
    assert described_metadata({"model": {}, "description": "a cat"}, "a.pth") == {}


def test_keys_of_another_version_are_left_out(tmp_path, caplog):
    path = tmp_path / "a.pth"
    config = "SOLVER: {BASELR: 1, BASE_LR: 0.5}\nNODE: {KEY: 1}\nVERSION: 2"
    torch.save({KEY: {"config": config}}, path)
    cfg = load_config(str(path), ["MODEL.META_ARCHITECTURE", "LSNet"])
    assert cfg.SOLVER.BASE_LR == 0.5 and "NODE" not in cfg
    assert "a.pth: SOLVER.BASELR is not a key of this version; it is left out" in caplog.text


def test_metadata_of_an_unusual_form_are_left_out(own_data, caplog):
    sigmas = np.array([0.1, 0.2])
    MetadataCatalog.get("odd").set(
        thing_dataset_id_to_contiguous_id={None: 0}, keypoint_oks_sigmas=sigmas
    )
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("odd",)
    assert describe_model(cfg)["metadata"] == {"keypoint_oks_sigmas": sigmas.tolist()}
    assert "will not have the thing_dataset_id_to_contiguous_id of data set odd" in caplog.text
    MetadataCatalog.pop("odd")


def test_no_config_in_a_checkpoint(tmp_path):
    path = tmp_path / "a.pth"

    def load(data):
        torch.save(data, path)
        return load_config(str(path))

    for data in ({"model": {}}, {KEY: "text"}, {KEY: {"config": 3}}):
        with pytest.raises(ConfigError, match="a.pth holds weights without a config"):
            load(data)
    damaged = ["[1]", "_BASE_: /etc/passwd", "SEED: 2020-01-01", "1: 2", "MODEL: &a {A: *a}"]
    for config in damaged:
        with pytest.raises(ConfigError, match="a.pth: its config is damaged"):
            load({KEY: {"config": config}})
    for config in ("A: !!python/object/apply:os.getcwd []", "A: ["):
        with pytest.raises(ConfigError, match="a.pth: not a plain YAML file"):
            load({KEY: {"config": config}})
    with pytest.raises(ConfigError, match=r"a.pth: .*SOLVER.MAX_ITER"):
        load({KEY: {"config": "SOLVER: {MAX_ITER: many}"}})
    path.write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="a.pth"):
        described_config(str(path))
    with pytest.raises(ConfigError, match="no such config file: .*b.pth"):
        load_config(str(tmp_path / "b.pth"))

import json

import pytest
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import COCO_PERSON_KEYPOINT_NAMES
from own_data import CATEGORIES, write_own_data
from tiny_coco import ROOT

from lsnet_d2.config_file import load_config
from lsnet_d2.errors import ConfigError
from lsnet_d2.starting_config import CocoFile, starting_config

BASES = ["plus/photos_joint.yaml", "joint/lsnet_R_50_FPN_1x.yaml", "bbox/lsnet_R_50_FPN_1x.yaml"]


@pytest.fixture
def train(tmp_path):
    path, images = write_own_data(tmp_path, "train", 2)
    yield CocoFile(json_file=str(path), image_root=str(images), data=json.loads(path.read_text()))
    for name in [n for n in DatasetCatalog.list() if n.startswith("birds_")]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def write(folder, base=BASES[0], **files):
    path = folder / "birds.yaml"
    path.write_text(starting_config(str(path), base_config=str(ROOT / "configs" / base), **files))
    return path


@pytest.mark.parametrize("base", BASES)
def test_the_config_fits_the_data(tmp_path, train, base):
    path = write(tmp_path, base, train=train)
    cfg = load_config(str(path), ["MODEL.DEVICE", "cpu"])
    node = cfg.MODEL.LSNET
    assert (node.TASK, node.BRANCHES) == ("joint", ["extreme", "contour", "keypoint"])
    assert (node.NUM_CLASSES, node.NUM_KEYPOINTS, node.KEYPOINT_CLASSES) == (3, 5, [1])
    assert len(cfg.TEST.KEYPOINT_OKS_SIGMAS) == 5
    assert tuple(cfg.DATASETS.TRAIN) == tuple(cfg.DATASETS.TEST) == ("birds_train",)
    assert cfg.OUTPUT_DIR == "output/birds"
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS) == (1000, 100)
    assert (cfg.TEST.EVAL_PERIOD, cfg.SOLVER.CHECKPOINT_PERIOD) == (200, 200)
    assert cfg.TEST.BEST_METRIC == ""  # it would be that of the training data
    assert len(DatasetCatalog.get("birds_train")) == 2
    assert MetadataCatalog.get("birds_train").thing_classes == ["ball", "bird", "box"]
    text = path.read_text()
    assert text.splitlines()[1:9] == [
        "# class 0: ball",
        "# class 1: bird",
        "# class 2: box",
        "# keypoints: 0 nose, 1 left_wing, 2 right_wing, 3 left_foot, 4 right_foot",
        "# exchanged in a mirrored image: left_wing - right_wing, left_foot - right_foot",
        "# skeleton: nose - left_wing, nose - right_wing, nose - left_foot, nose - right_foot",
        "# OKS sigmas: mean of COCO's, below",
        "# There are no other data to evaluate on: AP is that of the training data.",
    ]


def test_evaluates_on_other_data(tmp_path, train):
    path, images = write_own_data(tmp_path, "val", 1)
    test = CocoFile(json_file=str(path), image_root=str(images), data=json.loads(path.read_text()))
    config = write(tmp_path, train=train, test=test)
    cfg = load_config(str(config), ["MODEL.DEVICE", "cpu"])
    assert tuple(cfg.DATASETS.TRAIN) == ("birds_train",)
    assert tuple(cfg.DATASETS.TEST) == ("birds_val",)
    assert len(DatasetCatalog.get("birds_val")) == 1
    assert "no other data" not in config.read_text()
    assert cfg.TEST.BEST_METRIC == "bbox/AP"
    test.data["categories"] = CATEGORIES[:2]
    with pytest.raises(ConfigError, match=r"val.json has other categories.*train.json"):
        write(tmp_path, train=train, test=test)


def test_only_what_there_is_to_learn(tmp_path, train):
    for annotation in train.data["annotations"]:
        del annotation["segmentation"]
    train.data["categories"] = [{"id": c["id"], "name": c["name"]} for c in CATEGORIES]
    config = yaml.safe_load(write(tmp_path, train=train).read_text())
    assert config["MODEL"]["LSNET"] == {
        "TASK": "joint",
        "BRANCHES": ["extreme"],
        "NUM_CLASSES": 3,
    }
    assert config["TEST"] == {"EVAL_PERIOD": 200}


def test_tolerances_of_the_file(tmp_path, train):
    category = {**CATEGORIES[1], "keypoint_oks_sigmas": [0.1] * 5}
    train.data["categories"] = [category]
    train.data["annotations"] = [a for a in train.data["annotations"] if a["category_id"] == 20]
    text = write(tmp_path, train=train).read_text()
    assert "# OKS sigmas: 0.1, 0.1, 0.1, 0.1, 0.1\n" in text
    config = yaml.safe_load(text)
    assert "KEYPOINT_OKS_SIGMAS" not in config["TEST"]  # the data set's own are used
    assert config["MODEL"]["LSNET"]["KEYPOINT_CLASSES"] == []


@pytest.mark.parametrize("names", [COCO_PERSON_KEYPOINT_NAMES, [f"k{i}" for i in range(17)]])
def test_tolerances_of_cocos_people_are_for_them_alone(tmp_path, train, names):
    train.data["categories"] = [{"id": 20, "name": "person", "keypoints": list(names)}]
    text = write(tmp_path, train=train).read_text()
    ours = names == COCO_PERSON_KEYPOINT_NAMES
    assert ("# OKS sigmas: COCO's\n" in text) == ours
    assert ("KEYPOINT_OKS_SIGMAS" in yaml.safe_load(text)["TEST"]) != ours


def test_a_base_without_steps(tmp_path, train):
    base = tmp_path / "base.yaml"
    base.write_text(f"_BASE_: {ROOT}/configs/{BASES[0]}\nSOLVER: {{STEPS: []}}\n")
    assert "STEPS" not in write(tmp_path, base, train=train).read_text()


def test_the_training_is_as_long_as_the_data_ask_for(tmp_path, train):
    """Twelve rounds; on the base of COCO its steps after 8 and 11 of them."""
    for number in range(2, 2001):
        train.data["images"].append({**train.data["images"][0], "id": number})
        train.data["annotations"].append({**train.data["annotations"][0], "image_id": number})
    text = write(tmp_path, train=train).read_text()
    solver = yaml.safe_load(text)["SOLVER"]
    assert solver == {"MAX_ITER": 6003, "WARMUP_ITERS": 150, "CHECKPOINT_PERIOD": 1201}
    solver = yaml.safe_load(write(tmp_path, BASES[1], train=train).read_text())["SOLVER"]
    assert solver["MAX_ITER"] == 1501 and solver["WARMUP_ITERS"] == 150
    assert [round(step / 1501 * 12, 2) for step in solver["STEPS"]] == [8.0, 11.0]

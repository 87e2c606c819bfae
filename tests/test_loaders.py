import json

import numpy as np
import pytest
import tiny_coco
from PIL import Image
from tiny_coco import change_annotations, registered_cfg

from lsnet_d2.config_file import load_config
from lsnet_d2.data.annotation_checks import AnnotationError
from lsnet_d2.data.coco_json import register_lsnet_instances
from lsnet_d2.errors import ConfigError, UserError
from lsnet_d2.loaders import build_mapper, check_test_data, load_training_data


@pytest.fixture(params=tiny_coco.CONFIGS)
def coco(tmp_path, request):
    with tiny_coco.registered(tmp_path, request.param):
        yield tmp_path


def test_data_errors_name_the_file(coco):
    cfg = registered_cfg(coco)
    path = tiny_coco.json_file(coco, "train")
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match="tiny_train: .*train2017.json: not a complete JSON file"):
        load_training_data(cfg)
    dataset = json.loads(text)
    dataset["annotations"][2]["category_id"] = 12  # COCO has none
    path.write_text(json.dumps(dataset))
    message = "(?s)tiny_train: .*2017.json: .*annotation 3 of image 3: category 12 is not in the"
    with pytest.raises(UserError, match=message):
        load_training_data(cfg)
    path.unlink()
    with pytest.raises(UserError, match="tiny_train: .*_train2017.json: No such file"):
        load_training_data(cfg)
    cfg.DATASETS.TRAIN = ()
    with pytest.raises(ConfigError, match="DATASETS.TRAIN is empty"):
        load_training_data(cfg)


def test_images_without_what_was_dropped_are_filtered(coco, caplog):
    def spoil(annotation):
        if annotation["id"] > 1:
            annotation["bbox"][2] = 0

    change_annotations(coco, "train", spoil)
    opts = ("DATASETS.INVALID_ANNOTATIONS", "drop")
    (record,) = load_training_data(registered_cfg(coco, *opts))
    assert record["image_id"] == 1
    assert "annotation 2 of image" in caplog.text and "annotation 4 of image" in caplog.text
    keep = ("DATALOADER.FILTER_EMPTY_ANNOTATIONS", "False")
    assert len(load_training_data(registered_cfg(coco, *opts, *keep))) == tiny_coco.SPLITS["train"]
    change_annotations(coco, "train", lambda annotation: annotation.update(bbox=[0, 0, 0, 0]))
    for more in ((), keep):
        with pytest.raises(UserError, match="tiny_train: no annotation is left"):
            load_training_data(registered_cfg(coco, *opts, *more))


def test_classes_of_tests_are_those_of_training(tmp_path, caplog):
    def register(split, *names):
        categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
        image = {"id": 1, "file_name": "a.png", "height": 48, "width": 64}
        box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 4, 20, 20], "iscrowd": 0}
        content = {"images": [image], "annotations": [box], "categories": categories}
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
        register_lsnet_instances(f"pets_{split}", tmp_path / f"{split}.json", tmp_path)

    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(tmp_path / "a.png")
    register("train", "cat", "dog")
    register("same", "cat", "dog")
    register("other", "Katze", "dog")
    register("exchanged", "dog", "cat")
    cfg = load_config(
        str(tiny_coco.write_config(tmp_path)),
        ["MODEL.RETINANET.NUM_CLASSES", "2", "DATASETS.TRAIN", "('pets_train',)"],
    )
    load_training_data(cfg)
    check_test_data(cfg, "pets_same")
    assert "names" not in caplog.text
    check_test_data(cfg, "pets_other")
    assert "compared by their numbers" in caplog.text
    message = r"class 0 is 'dog' in .*exchanged.json\), but 'cat' in data set pets_train"
    with pytest.raises(AnnotationError, match=message):
        check_test_data(cfg, "pets_exchanged")


@pytest.mark.parametrize("task, read", [("segm", False), ("bbox", True)])
def test_extreme_points_are_asked_for_where_they_are_read(tmp_path, task, read):
    with tiny_coco.registered(tmp_path, "LSNet"):
        opts = ("INPUT.EXTREME_POINTS", "annotation", "MODEL.LSNET.TASK", task)
        cfg = registered_cfg(tmp_path, *opts)
        if read:
            with pytest.raises(AnnotationError, match="it has no extreme_points"):
                load_training_data(cfg)
        else:
            assert len(load_training_data(cfg)) == tiny_coco.SPLITS["train"]


def test_keypoints_need_names(coco):
    cfg = registered_cfg(coco, "MODEL.KEYPOINT_ON", "True")
    with pytest.raises(ConfigError, match="KEYPOINT_ON is True, but the metadata of tiny_train"):
        build_mapper(cfg, is_train=True)
    build_mapper(cfg, is_train=False)

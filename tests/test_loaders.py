import json

import pytest
import tiny_coco
from tiny_coco import change_annotations, registered_cfg

from lsnet_d2.errors import ConfigError, UserError
from lsnet_d2.loaders import build_mapper, load_training_data


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


def test_keypoints_need_names(coco):
    cfg = registered_cfg(coco, "MODEL.KEYPOINT_ON", "True")
    with pytest.raises(ConfigError, match="KEYPOINT_ON is True, but the metadata of tiny_train"):
        build_mapper(cfg, is_train=True)
    build_mapper(cfg, is_train=False)

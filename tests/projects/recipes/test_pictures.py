import json
from types import SimpleNamespace

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from recipes_project import pictures

from lsnet_d2.data.coco_json import register_lsnet_instances

SIZE = (100, 100)
SIGMAS = np.array([0.1, 0.1])


def true(x, y, w, h, **kwargs):
    return {"image_id": 1, "category_id": 1, "bbox": [x, y, w, h], "area": w * h, **kwargs}


def found(*box, score=0.9, **kwargs):
    return {**true(*box), "score": score, **kwargs}


def score(annotations, results):
    return pictures.photo_score(annotations, results, SIZE, SIGMAS)


def test_pairs_are_worth_their_iou_and_what_is_left_over_half():
    objects = [true(0, 0, 10, 10), true(50, 50, 10, 10)]
    assert score(objects, [found(0, 0, 10, 8)]) == pytest.approx(0.8 / 1.5)
    extra = [found(0, 0, 10, 8), found(0, 0, 10, 10, score=0.8), found(80, 0, 5, 5)]
    # the first takes the object; the better one comes too late
    assert score(objects, extra) == pytest.approx(0.8 / 2.5)
    assert score(objects, [found(0, 0, 10, 10, score=0.2)]) == 0  # below the floor
    assert score(objects, [found(0, 0, 10, 4)]) == 0  # overlaps too little
    assert score(objects[:1], [{**found(0, 0, 10, 10), "category_id": 2}]) == 0


def test_photos_without_objects():
    assert score([], []) is None
    assert score([], [found(0, 0, 10, 10)]) == 0


def test_what_lies_in_a_crowd_does_not_count():
    crowd = true(40, 40, 50, 50, iscrowd=1)
    objects = [true(0, 0, 10, 10), crowd]
    assert score(objects, [found(0, 0, 10, 10), found(45, 45, 10, 10)]) == 1
    assert score([crowd], []) is None


def test_the_quality_is_the_mean_of_what_is_known():
    square = [[0, 0, 10, 0, 10, 10, 0, 10]]
    half = pictures.to_rle([[0, 0, 10, 0, 10, 5, 0, 5]], *SIZE)
    posed = true(0, 0, 10, 10, segmentation=square, keypoints=[2, 2, 2, 0, 0, 0])
    moved = found(0, 0, 10, 10, segmentation=half, keypoints=[4, 2, 0.9, 77, 77, 0.9])
    # 2 pixels off, with a tolerance of twice sigma times the object's size, 10 pixels
    similarity = np.exp(-(2**2) / (2 * (0.2 * 10) ** 2))
    assert pictures.oks(posed, moved, SIGMAS) == pytest.approx(similarity)
    assert pictures.pair_quality(posed, moved, SIZE, SIGMAS) == pytest.approx(
        (1 + 0.5 + similarity) / 3
    )
    unlabelled = {**posed, "keypoints": [0] * 6}
    assert pictures.pair_quality(unlabelled, moved, SIZE, SIGMAS) == pytest.approx(0.75)


def test_a_group_with_a_slash_has_one_folder(tmp_path, monkeypatch):
    run = tmp_path / "run" / "inference"
    run.mkdir(parents=True)
    (run / "coco_instances_results.json").write_text("[]")
    MetadataCatalog.get("slash_val").json_file = str(tmp_path / "val.json")
    (tmp_path / "val.json").write_text(json.dumps({"images": [], "annotations": []}))
    cfg = SimpleNamespace(DATASETS=SimpleNamespace(TEST=("slash_val",)))
    monkeypatch.setattr(pictures, "load_config", lambda *_: cfg)
    monkeypatch.setattr(pictures, "oks_sigmas", lambda *_: (None, SIGMAS))
    row = SimpleNamespace(group="masks/small", name="LSNet", point={"LR": "0.1"}, folder="run")
    folder = pictures.draw_extremes(row, tmp_path, 2)
    assert folder == tmp_path / "pictures" / "masks_small_lsnet_lr_0_1"
    assert (folder / "scores.json").read_text() == "[]"


def test_tolerances_are_those_of_the_file(tmp_path, monkeypatch):
    run = tmp_path / "run" / "inference"
    run.mkdir(parents=True)
    category = {"id": 1, "name": "fly", "keypoints": ["head", "tail"]}
    category["keypoint_oks_sigmas"] = list(SIGMAS)
    image = {"id": 1, "file_name": "a.png", "height": SIZE[0], "width": SIZE[1]}
    posed = true(0, 0, 10, 10, id=1, keypoints=[2, 2, 2, 0, 0, 0])
    moved = found(0, 0, 10, 10, keypoints=[4, 2, 0.9, 77, 77, 0.9])
    content = {"images": [image], "annotations": [posed], "categories": [category]}
    (tmp_path / "flies.json").write_text(json.dumps(content))
    (run / "coco_instances_results.json").write_text(json.dumps([moved]))
    register_lsnet_instances("flies_val", tmp_path / "flies.json", tmp_path)
    cfg = get_cfg()
    cfg.DATASETS.TEST = ("flies_val",)
    monkeypatch.setattr(pictures, "load_config", lambda *_: cfg)
    row = SimpleNamespace(group="poses", name="LSNet", point={}, folder="run")
    folder = pictures.draw_extremes(row, tmp_path, 0)
    similarity = np.exp(-(2**2) / (2 * (0.2 * 10) ** 2))
    (photo,) = json.loads((folder / "scores.json").read_text())
    assert photo["score"] == pytest.approx((1 + similarity) / 2)


def test_regions_to_ignore_are_not_missed():
    objects = [true(0, 0, 10, 10), true(50, 50, 30, 30, ignore=1)]
    assert score(objects, [found(0, 0, 10, 10), found(52, 52, 10, 10)]) == pytest.approx(1)


def test_the_best_come_first(tmp_path):
    images = [{"id": i, "height": 100, "width": 100} for i in (1, 2, 3)]
    objects = [true(0, 0, 10, 10), {**true(0, 0, 10, 10), "image_id": 2}]
    path = tmp_path / "val.json"
    path.write_text(json.dumps({"images": images, "annotations": objects}))
    results = [found(0, 0, 10, 6), {**found(0, 0, 10, 9), "image_id": 2}]
    ranked = pictures.rank_photos(path, results, SIGMAS)
    assert ranked == [(2, pytest.approx(0.9)), (1, pytest.approx(0.6))]

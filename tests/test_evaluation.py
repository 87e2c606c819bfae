import json

import pytest
import tiny_coco
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, Instances

from lsnet_d2.config_file import load_config
from lsnet_d2.errors import ConfigError, UserError
from lsnet_d2.evaluation import build_evaluator, evaluation_tasks


@pytest.fixture
def coco(tmp_path):
    tiny_coco.write_coco(tmp_path)
    register_coco_instances(
        "tiny_eval",
        {},
        str(tiny_coco.json_file(tmp_path, "val")),
        str(tmp_path / "coco" / "val2017"),
    )
    yield tmp_path
    DatasetCatalog.remove("tiny_eval")
    MetadataCatalog.remove("tiny_eval")


def make_cfg(folder, *opts):
    return load_config(str(tiny_coco.write_config(folder)), ["MODEL.DEVICE", "cpu", *opts])


def predictions(image_id, shift=0.0, **fields):
    """The object of image ``image_id`` in the small data set, moved by ``shift`` pixels."""
    instances = Instances(tiny_coco.SIZE)
    x = 8 + 4 * image_id + shift
    instances.pred_boxes = Boxes(torch.tensor([[x, 10.0, x + 24, 30.0]]))
    instances.scores = torch.tensor([0.9])
    instances.pred_classes = torch.tensor([0 if image_id % 2 else 2])
    for name, value in fields.items():
        instances.set(name, value)
    return {"image_id": image_id}, {"instances": instances}


def evaluate(folder, *outputs, **kwargs):
    DatasetCatalog.get("tiny_eval")  # as the data loader does it
    evaluator = build_evaluator(make_cfg(folder), "tiny_eval", str(folder / "results"), **kwargs)
    evaluator.reset()
    for image, output in outputs:
        evaluator.process([image], [output])
    return evaluator.evaluate()


def test_perfect_predictions(coco):
    results = evaluate(coco, predictions(1), predictions(2))["bbox"]
    assert results["AP"] == pytest.approx(100)
    assert results["AP-person"] == results["AP-car"] == pytest.approx(100)


def test_shifted_predictions(coco):
    # moved by 4 of 24 pixels: IoU 20/28 = 0.714, right at the thresholds 0.5, 0.55, ... 0.7
    results = evaluate(coco, predictions(1, 4.0), predictions(2, 4.0))["bbox"]
    assert results["AP"] == pytest.approx(50)
    assert results["AP50"] == pytest.approx(100)
    assert results["AP75"] == pytest.approx(0)


def test_limit_of_detections(coco):
    results = evaluate(coco, predictions(1), predictions(2), max_dets=300)["bbox"]
    assert results["AP"] == pytest.approx(100)


def test_results_file_has_extreme_points(coco):
    points = torch.tensor([[[20.5, 10], [12, 15], [21, 30], [36, 20]]])
    evaluate(coco, predictions(1, pred_extreme_points=points), predictions(2))
    path = coco / "results" / "coco_instances_results.json"
    first, second = json.loads(path.read_text())
    assert first["extreme_points"] == points[0].tolist()
    assert first["category_id"] == 1 and first["bbox"] == [12, 10, 24, 20]
    assert "extreme_points" not in second


def test_predicted_keypoints_are_left_alone(coco):
    keypoints = torch.full((1, 17, 3), 5.0)
    image, output = predictions(1, pred_keypoints=keypoints)
    evaluator = build_evaluator(make_cfg(coco), "tiny_eval", None)
    evaluator.reset()
    evaluator.process([image], [output])
    assert (output["instances"].pred_keypoints == 5).all()


def test_incomplete_ground_truth(coco):
    path = tiny_coco.json_file(coco, "val")
    dataset = json.loads(path.read_text())
    del dataset["info"]
    for number, annotation in enumerate(dataset["annotations"]):
        del annotation["area"], annotation["iscrowd"]
        annotation["id"] = number  # pycocotools takes 0 for "not matched"
    path.write_text(json.dumps(dataset))
    results = evaluate(coco, predictions(1), predictions(2))["bbox"]
    assert results["AP"] == results["APs"] == pytest.approx(100)


def test_without_annotations_only_results_are_written(coco):
    path = tiny_coco.json_file(coco, "val")
    dataset = json.loads(path.read_text())
    del dataset["annotations"]
    path.write_text(json.dumps(dataset))
    assert evaluate(coco, predictions(1)) == {}
    assert len(json.loads((coco / "results" / "coco_instances_results.json").read_text())) == 1


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.pop("categories"), "'categories' is missing or empty"),
        (lambda d: d.update(images=[]), "'images' is missing or empty"),
        (lambda d: d["annotations"][1].pop("bbox"), "annotation 2 has no 'bbox'"),
        (lambda d: d["annotations"][1].pop("id"), "annotation number 1 has no 'id'"),
    ],
)
def test_unusable_ground_truth(coco, change, message):
    path = tiny_coco.json_file(coco, "val")
    dataset = json.loads(path.read_text())
    change(dataset)
    path.write_text(json.dumps(dataset))
    with pytest.raises(UserError, match=f"instances_val2017.json: {message}"):
        build_evaluator(make_cfg(coco), "tiny_eval")


def test_missing_or_truncated_file(coco):
    path = tiny_coco.json_file(coco, "val")
    path.write_text(path.read_text()[:100])
    with pytest.raises(UserError, match="not complete JSON"):
        build_evaluator(make_cfg(coco), "tiny_eval")
    path.unlink()
    with pytest.raises(UserError, match="no such annotation file"):
        build_evaluator(make_cfg(coco), "tiny_eval")


def test_class_count_must_agree(coco):
    DatasetCatalog.get("tiny_eval")
    cfg = make_cfg(coco, "MODEL.RETINANET.NUM_CLASSES", "3")
    with pytest.raises(ConfigError, match="3 classes.*set MODEL.RETINANET.NUM_CLASSES 80"):
        build_evaluator(cfg, "tiny_eval")


def test_tasks_follow_the_branches(coco):
    cfg = make_cfg(coco)
    assert evaluation_tasks(cfg) is None
    cfg.MODEL.META_ARCHITECTURE = "LSNet"
    assert evaluation_tasks(cfg) == ("bbox",)

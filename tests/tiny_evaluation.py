"""Predictions and keypoints for the small data set, and evaluations of them."""

import tiny_coco
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances
from tiny_coco import registered_cfg

from lsnet_d2.evaluation import LSNetEvaluator, build_evaluator


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
    DatasetCatalog.get("tiny_val")  # as the data loader does it
    cfg, results = registered_cfg(folder), str(folder / "results")
    evaluator = build_evaluator(cfg, "tiny_val", results, **kwargs)
    return run(evaluator, *outputs)


def evaluate_tasks(folder, tasks, *outputs, **kwargs):
    DatasetCatalog.get("tiny_val")
    evaluator = LSNetEvaluator("tiny_val", tasks=tasks, output_dir=str(folder / "out"), **kwargs)
    return run(evaluator, *outputs)


def run(evaluator, *outputs):
    evaluator.reset()
    for image, output in outputs:
        evaluator.process([image], [output])
    return evaluator.evaluate()


def contour(image_id, dx=0.0, width=24.0):
    """The outline of the object of an image, (1, 4, 2)."""
    x = 8 + 4 * image_id + dx
    return torch.tensor([[[x, 10.0], [x + width, 10], [x + width, 30], [x, 30]]])


def add_keypoints(annotation):
    """Three, at x + 2, x + 4 and (not labelled) 0; the second image's object has none."""
    if annotation["id"] == 1:
        x = annotation["bbox"][0]
        annotation["keypoints"] = [x + 2 - 0.5, 14.5, 2, x + 4 - 0.5, 19.5, 1, 0, 0, 0]


def keypoints(image_id, dx=0.0):
    x = 8 + 4 * image_id + dx
    return torch.tensor([[[x + 2, 15.0, 0.9], [x + 4, 20.0, 0.9], [50.0, 5.0, 0.9]]])

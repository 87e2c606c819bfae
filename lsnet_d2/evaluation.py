"""COCO evaluation of whatever the model predicts."""

import contextlib
import io
import json
import logging
import os
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json

from .config_file import classes_key, num_classes
from .errors import ConfigError, UserError
from .modeling import build_branches

logger = logging.getLogger(__name__)

# What the predictions of a branch are scored as, besides boxes.
TASKS = {"pred_extreme_points": (), "pred_contours": ("segm",), "pred_keypoints": ("keypoints",)}


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str | None = None, max_dets: int | None = None
) -> "LSNetEvaluator":
    """The evaluator of a registered data set for the model of the config.

    Args:
        output_folder: gets ``coco_instances_results.json``.
        max_dets: detections per image that count for AP. None: COCO's 100.

    Raises:
        ConfigError: the numbers of classes of the model and the data set differ.
        UserError: see :class:`LSNetEvaluator`.
    """
    check_num_classes(cfg, dataset_name)
    return LSNetEvaluator(
        dataset_name,
        tasks=evaluation_tasks(cfg),
        output_dir=output_folder,
        max_dets_per_image=max_dets,
        kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
        # the official implementation, so that figures do not depend on how Detectron2 was built
        use_fast_impl=False,
        # Detectron2 would take a converted file of an earlier run, whatever the data are now
        allow_cached_coco=False,
    )


def evaluation_tasks(cfg: CfgNode) -> tuple[str, ...] | None:
    """COCO's names of what is scored; None lets Detectron2 infer it from the predictions."""
    if cfg.MODEL.META_ARCHITECTURE != "LSNet":
        return None
    return ("bbox", *(task for b in build_branches(cfg) for task in TASKS[b.pred_field]))


def check_num_classes(cfg: CfgNode, dataset_name: str) -> None:
    """Compare the model's classes with the data set's, where these are known.

    Raises:
        ConfigError: they differ in number.
    """
    names = MetadataCatalog.get(dataset_name).get("thing_classes")
    if names is not None and len(names) != num_classes(cfg):
        raise ConfigError(
            f"the model has {num_classes(cfg)} classes, but data set {dataset_name} has "
            f"{len(names)}: set {classes_key(cfg)} {len(names)}"
        )


class LSNetEvaluator(COCOEvaluator):
    """Detectron2's COCO evaluator for our predictions and for less than perfect files.

    - Extreme points go into the results file, as ``extreme_points`` [[x, y], ...] in pixels of
      the original image (top, left, bottom, right).
    - The ground truth may lack ``info``, ``area`` and ``iscrowd``. Without ``annotations``, only
      the results file is written.
    """

    def __init__(self, dataset_name: str, *args: Any, **kwargs: Any) -> None:
        """See :class:`COCOEvaluator`.

        Raises:
            UserError: the annotation file is missing, broken, or lacks what evaluation needs.
        """
        json_file = MetadataCatalog.get(dataset_name).get("json_file")
        if json_file is not None:
            check_coco_file(json_file)
        super().__init__(dataset_name, *args, **kwargs)
        if self._do_evaluation:
            complete_annotations(self._coco_api.dataset)
            with contextlib.redirect_stdout(io.StringIO()):  # it prints
                self._coco_api.createIndex()
        else:
            logger.warning("%s has no annotations: nothing can be scored", json_file)

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for image, output in zip(inputs, outputs, strict=True):
            if "instances" not in output:  # proposals
                super().process([image], [output])
                continue
            instances = output["instances"].to("cpu")
            if instances.has("pred_keypoints"):
                # the conversion shifts them in place
                instances.pred_keypoints = instances.pred_keypoints.clone()
            results = instances_to_coco_json(instances, image["image_id"])
            if instances.has("pred_extreme_points"):
                for result, points in zip(
                    results, instances.pred_extreme_points.tolist(), strict=True
                ):
                    result["extreme_points"] = points
            self._predictions.append({"image_id": image["image_id"], "instances": results})


def check_coco_file(path: str) -> None:
    """
    Raises:
        UserError: there is no such file, or it is no COCO file with images and categories, or
            an annotation lacks a key that nothing can stand in for.
    """
    if not os.path.isfile(path):
        raise UserError(f"no such annotation file: {path}")
    with open(path, encoding="utf-8") as file:
        try:
            dataset = json.load(file)
        except ValueError as error:
            raise UserError(f"{path}: not complete JSON: {error}") from error
    if not isinstance(dataset, dict):
        raise UserError(f"{path}: not a COCO file, which is an object with 'images' and others")
    for key in ("images", "categories"):
        if not dataset.get(key):
            raise UserError(f"{path}: {key!r} is missing or empty")
    for index, annotation in enumerate(dataset.get("annotations", [])):
        missing = [
            key for key in ("id", "image_id", "category_id", "bbox") if key not in annotation
        ]
        if missing:
            name = annotation.get("id", f"number {index}")
            raise UserError(f"{path}: annotation {name} has no {missing[0]!r}")


def complete_annotations(dataset: dict[str, Any]) -> None:
    """Give annotations what pycocotools needs, in place.

    ``iscrowd`` is 0 where it is missing, and ``area`` that of the box, which only sorts objects
    into small, medium and large. If an id is 0, which pycocotools takes for "not matched", ids
    are numbered anew.
    """
    dataset.setdefault("info", {})
    annotations = dataset["annotations"]
    without_area = [annotation for annotation in annotations if "area" not in annotation]
    for annotation in without_area:
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    if without_area:
        logger.warning(
            "%d annotations have no 'area'; they are sorted into small, medium and large by the "
            "areas of their boxes",
            len(without_area),
        )
    for annotation in annotations:
        annotation.setdefault("iscrowd", 0)
    if any(annotation["id"] == 0 for annotation in annotations):
        for number, annotation in enumerate(annotations, start=1):
            annotation["id"] = number

"""COCO evaluation of whatever the model predicts."""

import itertools
import json
import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from pycocotools.cocoeval import Params

from .config_file import classes_key, num_classes, num_keypoints
from .data.annotation_checks import check_class_count
from .errors import ConfigError, UserError
from .exports import SCORE_KEYS, coco_results, landmark_columns, with_category_ids
from .fast_coco import FastCOCOeval
from .files import atomic_write
from .ground_truth import (
    GROUND_TRUTHS,
    check_coco_file,
    coco_index,
    complete_annotations,
    count_keypoints,
)
from .landmark_errors import (
    LANDMARK_ERRORS,
    MIN_IOU,
    SCORE_FLOOR,
    Detections,
    format_errors,
    landmark_errors,
    summarize_errors,
)
from .modeling import build_branches

logger = logging.getLogger(__name__)

COCO_OKS_SIGMAS = Params("keypoints").kpt_oks_sigmas.tolist()

# What the predictions of a branch are scored as, besides boxes.
_EVALUATED = {
    "pred_extreme_points": (),
    "pred_contours": ("segm",),
    "pred_keypoints": ("keypoints",),
}

# What of a result COCO's evaluation of a task sees, in the order in which tasks are named. Without
# "bbox" it sorts masks into small, medium and large by their own area; keypoints go by the box's.
TASK_KEYS = {"bbox": ("bbox",), "segm": ("segmentation",), "keypoints": ("keypoints", "bbox")}


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str | None = None, max_dets: int | None = None
) -> "LSNetEvaluator":
    """The evaluator of a registered data set for the model of the config.

    Args:
        output_folder: gets ``coco_instances_results.json``.
        max_dets: detections per image that count for AP of boxes and masks. None: COCO's 100.

    Raises:
        AnnotationError: the numbers of classes of the model and the data set differ.
        ConfigError: those of keypoints or of their OKS sigmas do.
        UserError: see :class:`LSNetEvaluator`.
    """
    check_class_count([dataset_name], num_classes(cfg), classes_key(cfg))
    tasks = evaluation_tasks(cfg)
    source, sigmas = oks_sigmas(cfg, dataset_name)
    evaluator = LSNetEvaluator(
        dataset_name,
        tasks=tasks,
        output_dir=output_folder,
        max_dets_per_image=max_dets,
        kpt_oks_sigmas=sigmas,
        # Detectron2 would take a converted file of an earlier run, whatever the data are now
        allow_cached_coco=False,
    )
    needs_sigmas = cfg.MODEL.KEYPOINT_ON if tasks is None else "keypoints" in tasks
    if needs_sigmas and evaluator.num_keypoints not in (0, len(sigmas)):
        raise ConfigError(
            f"data set {dataset_name} has {evaluator.num_keypoints} keypoints, but there are "
            f"{len(sigmas)} OKS sigmas, {source}: set TEST.KEYPOINT_OKS_SIGMAS to "
            f"{evaluator.num_keypoints} values"
        )
    if needs_sigmas and evaluator.num_keypoints not in (0, num_keypoints(cfg)):
        raise ConfigError(
            f"data set {dataset_name} has {evaluator.num_keypoints} keypoints, but the model "
            f"{num_keypoints(cfg)}"
        )
    return evaluator


def evaluation_tasks(cfg: CfgNode) -> tuple[str, ...] | None:
    """COCO's names of what is scored; None infers it from the predictions."""
    if cfg.MODEL.META_ARCHITECTURE != "LSNet":
        return None
    needed = {"bbox", *(task for b in build_branches(cfg) for task in _EVALUATED[b.pred_field])}
    return tuple(task for task in TASK_KEYS if task in needed)


def oks_sigmas(cfg: CfgNode, dataset_name: str) -> tuple[str, list[float]]:
    """Where the tolerances of keypoints come from, for messages, and their values.

    The config's, else those in the data set's metadata ``keypoint_oks_sigmas``, else COCO's for
    people.
    """
    metadata = MetadataCatalog.get(dataset_name).get("keypoint_oks_sigmas")
    sources = {
        "those of TEST.KEYPOINT_OKS_SIGMAS": cfg.TEST.KEYPOINT_OKS_SIGMAS,
        "those of its metadata keypoint_oks_sigmas": [] if metadata is None else metadata,
        "COCO's defaults": COCO_OKS_SIGMAS,
    }
    return next((source, list(values)) for source, values in sources.items() if len(values))


class LSNetEvaluator(COCOEvaluator):
    """Detectron2's COCO evaluator for our predictions and for less than perfect files.

    - Results are Detectron2's for each task ("bbox", "segm", "keypoints"), and "landmarks" with
      the errors of :mod:`lsnet_d2.landmark_errors` where there are landmarks.
    - Contours are scored as masks; they become RLEs without being drawn.
    - In pixels of the original image, the results file has ``extreme_points`` (top, left, bottom,
      right) and ``contour``, both [[x, y], ...], and COCO's ``keypoints``, which are 0.5 less
      (indices of pixels). Where masks and poses have scores of their own, it has ``contour_score``
      and ``pose_score``, by which they are ranked.
    - The ground truth may lack ``info``, ``area``, ``iscrowd`` and ``num_keypoints``, and some
      annotations may lack keypoints. For masks, objects with a box only are regions to ignore.
      Without ``annotations``, as in COCO's files of test images, which Detectron2's loader reads
      (ours does not), only the results file is written.
    - AP is always computed by :class:`~lsnet_d2.fast_coco.FastCOCOeval`, whose figures are those
      of pycocotools, however Detectron2 was built.
    """

    def __init__(self, dataset_name: str, *args: Any, **kwargs: Any) -> None:
        """See :class:`COCOEvaluator`. ``use_fast_impl`` has no effect.

        Raises:
            UserError: the annotation file is missing, broken, or lacks what evaluation needs; see
                :func:`lsnet_d2.ground_truth.check_coco_file`.
        """
        json_file = MetadataCatalog.get(dataset_name).get("json_file")
        if json_file is not None:
            check_coco_file(json_file)
        super().__init__(dataset_name, *args, **{**kwargs, "use_fast_impl": False})
        sigmas = kwargs.get("kpt_oks_sigmas")
        self._sigmas = COCO_OKS_SIGMAS if sigmas is None or not len(sigmas) else list(sigmas)
        self.num_keypoints = 0  # of an object of the data set; 0: it has none
        if self._do_evaluation:
            complete_annotations(self._coco_api.dataset)
            self.num_keypoints = count_keypoints(self._coco_api.dataset["annotations"])
            self._coco_api = coco_index(self._coco_api.dataset)
        else:
            logger.warning("%s has no annotations: nothing can be scored", json_file)

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for image, output in zip(inputs, outputs, strict=True):
            if "instances" not in output:  # proposals
                super().process([image], [output])
                continue
            instances = output["instances"].to("cpu")
            # clones: views would keep all of a batch
            landmarks = {
                field: instances.get(field).float().clone()
                for field in LANDMARK_ERRORS
                if instances.has(field)
            }
            self._predictions.append(
                {
                    "image_id": image["image_id"],
                    "instances": coco_results(instances, image["image_id"]),
                    "landmarks": landmarks,
                }
            )

    def _eval_predictions(
        self, predictions: list[dict], img_ids: Iterable[int] | None = None
    ) -> None:
        """In place of Detectron2's, which copies and keeps lists of all coordinates."""
        predictions = self._with_category_ids(predictions)
        if self._output_dir:
            write_results(
                os.path.join(self._output_dir, "coco_instances_results.json"), predictions
            )
        if not self._do_evaluation:
            logger.info("Annotations are not available for evaluation.")
            return
        results = list(itertools.chain.from_iterable(p["instances"] for p in predictions))
        for task in self._tasks or self._tasks_from_predictions(results):
            if task == "keypoints" and not self.num_keypoints:
                logger.warning("%s has no keypoints: none are scored", self._metadata.name)
                continue
            evaluation = self._evaluate_task(task, results, img_ids) if results else None
            self._results[task] = self._derive_coco_results(
                evaluation, task, class_names=self._metadata.get("thing_classes")
            )
        self._evaluate_landmarks(predictions, img_ids)

    def _with_category_ids(self, predictions: list[dict]) -> list[dict]:
        """Predictions with the annotation file's ids of classes, not the model's."""
        return [
            {**prediction, "instances": with_category_ids(prediction["instances"], self._metadata)}
            for prediction in predictions
        ]

    def _evaluate_task(
        self, task: str, results: list[dict], img_ids: Iterable[int] | None
    ) -> FastCOCOeval:
        if task == "keypoints":
            self._check_keypoints(len(results[0]["keypoints"]) // 3)
        keys = ("image_id", "category_id", *TASK_KEYS[task])
        _, score = SCORE_KEYS.get(task, (None, "score"))
        true = coco_index(GROUND_TRUTHS[task](self._coco_api))
        found = [
            {**{key: result[key] for key in keys}, "score": result.get(score, result["score"])}
            for result in results
        ]
        evaluation = FastCOCOeval(true, found, task)
        if task == "keypoints":
            evaluation.params.kpt_oks_sigmas = np.array(self._sigmas)
        else:
            evaluation.params.maxDets = self._max_dets_per_image
        if img_ids is not None:
            evaluation.params.imgIds = list(img_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return evaluation

    def _check_keypoints(self, predicted: int) -> None:
        numbers = (predicted, self.num_keypoints, len(self._sigmas))
        if len(set(numbers)) > 1:
            raise UserError(
                f"the model predicts {numbers[0]} keypoints, data set {self._metadata.name} has "
                f"{numbers[1]}, and there are {numbers[2]} OKS sigmas; all must be the same"
            )

    def _evaluate_landmarks(
        self, predictions: list[dict], img_ids: Iterable[int] | None = None
    ) -> None:
        chosen = None if img_ids is None else set(img_ids)
        detections = (
            to_detections(prediction)
            for prediction in predictions
            if chosen is None or prediction["image_id"] in chosen
        )
        errors = landmark_errors(self._coco_api, detections)
        if not errors:
            return
        names = {category["id"]: category["name"] for category in self._coco_api.cats.values()}
        results = summarize_errors(errors, names)
        logger.info(
            "Errors of landmarks, of objects matched at IOU >= %g by detections with score >= %g:"
            "\n%s",
            MIN_IOU,
            SCORE_FLOOR,
            format_errors(results, errors, names.values()),
        )
        self._results["landmarks"] = results


def to_detections(prediction: dict) -> Detections:
    """The predictions for an image as the measurement of landmarks takes them."""
    results = prediction["instances"]
    return Detections(
        image_id=prediction["image_id"],
        boxes=np.array([r["bbox"] for r in results], dtype=np.float64).reshape(-1, 4),
        scores=np.array([r["score"] for r in results], dtype=np.float64),
        categories=np.array([r["category_id"] for r in results]),
        landmarks={field: points.numpy() for field, points in prediction["landmarks"].items()},
    )


def write_results(path: str, predictions: Iterable[dict]) -> None:
    """Write COCO's results file, one entry a line."""
    with atomic_write(path, "w") as file:
        file.write("[")
        for number, entry in enumerate(_entries(predictions)):
            file.write((",\n" if number else "\n") + json.dumps(entry))
        file.write("\n]\n")


def _entries(predictions: Iterable[dict]) -> Iterator[dict]:
    for prediction in predictions:
        columns = landmark_columns(prediction["landmarks"])
        for index, result in enumerate(prediction["instances"]):
            yield {**result, **{key: points[index] for key, points in columns.items()}}

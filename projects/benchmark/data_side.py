"""What surrounds the model: data, targets, evaluation."""

import contextlib
import io
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2 import model_zoo
from detectron2.data import DatasetMapper
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from gauges import CPU, PeakMemory, seconds
from inputs import crowd, dataset_dicts, ellipses, evaluated
from pycocotools import mask as mask_util

from lsnet_d2.config_file import load_config
from lsnet_d2.data.dataset_mapper import LSNetDatasetMapper
from lsnet_d2.data.polygons import polygons_to_rle
from lsnet_d2.fast_coco import FastCOCOeval
from lsnet_d2.ground_truth import coco_index
from lsnet_d2.modeling.assigners import assign_atss, assign_nearest
from lsnet_d2.modeling.points import make_anchor_points

ROOT = Path(__file__).resolve().parents[2]
CONTOURS = 100  # of an image, which become RLEs
CONTOUR_IMAGE = (480, 640)
MAPPED_IMAGES = 16
TARGET_IMAGE = (800, 1333)
FEW, MANY = 10, 1000  # objects
EVALUATED_IMAGES = 5000


def data(repeats: int) -> dict[str, float]:
    """Seconds, and bytes of "targets_memory": contours to RLEs with and without bitmaps; our mapper
    and Detectron2's with masks; targets of few and of many objects; evaluation."""
    contours = ellipses(np.random.default_rng(0), CONTOURS, *CONTOUR_IMAGE)
    result = {
        "rle": seconds(lambda: polygons_to_rle(contours, *CONTOUR_IMAGE), 5 * repeats),
        "bitmaps": seconds(lambda: bitmaps_to_rle(contours, *CONTOUR_IMAGE), 5 * repeats),
    }
    with tempfile.TemporaryDirectory() as folder:
        dicts = dataset_dicts(Path(folder), MAPPED_IMAGES)
        for name, mapper in mappers().items():
            result[name] = seconds(lambda m=mapper: map_all(m, dicts), repeats) / len(dicts)
    return {**result, **targets(repeats), **evaluation(EVALUATED_IMAGES)}


def bitmaps_to_rle(contours: np.ndarray, height: int, width: int) -> list[dict]:
    """The masks of contours by way of drawing each."""
    rles = []
    for contour in contours:
        bitmap = np.zeros((height, width), dtype=np.uint8)
        cv2.fillPoly(bitmap, [contour.round().astype(np.int32)], 1)
        rle = mask_util.encode(np.asfortranarray(bitmap))
        rles.append({**rle, "counts": rle["counts"].decode("ascii")})
    return rles


def mappers() -> dict[str, DatasetMapper]:
    """Ours for boxes and for contours, and Detectron2's for masks; images of the same size."""
    zoo = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
    zoo.INPUT.MIN_SIZE_TRAIN = (800,)
    made = {"mask_mapper": DatasetMapper(zoo, is_train=True)}
    for name, folder in (("mapper_bbox", "bbox"), ("mapper_segm", "segm")):
        config = ROOT / "configs" / folder / "lsnet_R_50_FPN_1x.yaml"
        cfg = load_config(str(config), ["MODEL.DEVICE", "cpu"], need_data_sets=False)
        made[name] = LSNetDatasetMapper(cfg, is_train=True)
    return made


def map_all(mapper: DatasetMapper, dicts: list[dict]) -> None:
    for record in dicts:
        mapper(record)


def targets(repeats: int) -> dict[str, float]:
    """Which points learn which object in both stages, and how far memory grows at most."""
    height, width = TARGET_IMAGE
    strides = [8, 16, 32, 64, 128]
    sizes = [(-(-height // stride), -(-width // stride)) for stride in strides]
    points = make_anchor_points(sizes, strides, torch.device("cpu"))
    valid = torch.ones(len(points.xy), dtype=torch.bool)
    predicted = torch.cat([points.xy - 20, points.xy + 20], dim=1)

    def assign(boxes: torch.Tensor) -> None:
        levels = points.per_level
        assign_nearest(points.xy, strides, levels, boxes, valid=valid)
        assign_atss(predicted, levels, boxes, valid=valid)

    result = {}
    for number in (FEW, MANY):
        boxes = crowd(number, height, width)
        assign(boxes)
        peak = PeakMemory(CPU)
        result[f"targets_{number}"] = seconds(lambda b=boxes: assign(b), 5 * repeats)
        result["targets_memory"] = peak.growth()
    return result


def evaluation(images: int) -> dict[str, float]:
    """AP of boxes and of masks, as we compute it and as pycocotools does it, from the results on.

    Raises:
        ArithmeticError: the figures differ.
    """
    dataset, results = evaluated(images)
    times, figures = {"evaluation": 0.0, "pycocotools": 0.0}, {}
    with contextlib.redirect_stdout(io.StringIO()):
        true = coco_index(dataset)
        for task, key in (("bbox", "bbox"), ("segm", "segmentation")):
            keys = ("image_id", "category_id", "score", key)
            found = [{k: result[k] for k in keys} for result in results]
            for name in times:
                start = time.perf_counter()
                if name == "evaluation":
                    run = FastCOCOeval(true, found, task)
                else:
                    run = COCOevalMaxDets(true, true.loadRes(found), task)
                run.evaluate()
                run.accumulate()
                run.summarize()
                times[name] += time.perf_counter() - start
                figures[name] = run.stats.tolist()
            if figures["evaluation"] != figures["pycocotools"]:
                raise ArithmeticError(f"{task}: {figures}")
    return times

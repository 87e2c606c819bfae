"""The photos that a model does best on, and worst, drawn beside the truth.

The score of a photo is its panoptic quality ("Panoptic Segmentation", arXiv 1801.00868), of
objects: detections choose theirs as in :mod:`lsnet_d2.landmark_errors`. The score is
the sum of the qualities of the pairs, divided by their number plus half of the objects and half of
the detections that are left over. The quality of a pair is the mean of what is predicted and known:
IOU of boxes, IOU of masks, OKS of keypoints. Crowds are no objects, and detections that lie in one
do not count. Photos with neither objects nor detections have no score.
"""

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from plan import ROOT, slug
from pycocotools import mask as mask_util
from rows import Row, title_of

from lsnet_d2.config_file import load_config
from lsnet_d2.data.annotation_checks import is_region
from lsnet_d2.data.catalog import load_metadata
from lsnet_d2.errors import UserError
from lsnet_d2.evaluation import oks_sigmas
from lsnet_d2.files import atomic_write, make_folder
from lsnet_d2.landmark_errors import MIN_IOU, SCORE_FLOOR, Detections, match


def pair_quality(true: dict, found: dict, size: tuple[int, int], sigmas: np.ndarray) -> float:
    """See above.

    Args:
        true, found: an annotation and a result in COCO's format.
        size: (height, width) of the photo.
        sigmas: (K,), tolerances of the keypoints.
    """
    parts = [box_ious([found["bbox"]], [true["bbox"]], [0])[0, 0]]
    if found.get("segmentation") and true.get("segmentation"):
        masks = [to_rle(entry["segmentation"], *size) for entry in (found, true)]
        parts.append(mask_util.iou(masks[:1], masks[1:], [0])[0, 0])
    if found.get("keypoints") and any(v > 0 for v in true.get("keypoints", ())[2::3]):
        parts.append(oks(true, found, sigmas))
    return float(np.mean(parts))


def oks(true: dict, found: dict, sigmas: np.ndarray) -> float:
    """COCO's similarity of a pose and one of which some keypoints are labelled."""
    points, truth = (np.reshape(e["keypoints"], (-1, 3)).astype(float) for e in (found, true))
    distances = ((points - truth)[:, :2] ** 2).sum(1)
    area = true.get("area", true["bbox"][2] * true["bbox"][3])
    similarity = np.exp(-distances / (2 * (2 * sigmas) ** 2 * max(area, 1e-9)))
    return float(similarity[truth[:, 2] > 0].mean())


def box_ious(found: list, true: list, crowds: list[int]) -> np.ndarray:
    """(N, M), for crowds the share of the detection that lies in it."""
    found, true = (np.reshape(boxes, (-1, 4)).astype(float) for boxes in (found, true))
    if not len(found) or not len(true):
        return np.zeros((len(found), len(true)))
    return np.asarray(mask_util.iou(found, true, crowds))


def to_rle(segmentation: list | dict, height: int, width: int) -> dict:
    if isinstance(segmentation, list):
        parts = [part for part in segmentation if len(part) >= 6]
        return mask_util.merge(mask_util.frPyObjects(parts, height, width))
    if isinstance(segmentation["counts"], list):
        return mask_util.frPyObjects(segmentation, height, width)
    return segmentation


def photo_score(
    annotations: list[dict], results: list[dict], size: tuple[int, int], sigmas: np.ndarray
) -> float | None:
    """See above; all of one photo."""
    crowds = [a["bbox"] for a in annotations if is_region(a)]
    objects = [a for a in annotations if not is_region(a)]
    results = [r for r in results if r["score"] >= SCORE_FLOOR]
    pairs = match(detections(results), objects)
    qualities = [pair_quality(true, results[index], size, sigmas) for index, true in pairs]
    in_crowds = box_ious([r["bbox"] for r in results], crowds, [1] * len(crowds))
    left_over = np.delete(in_crowds, [index for index, _ in pairs], axis=0)
    extra = int((left_over < MIN_IOU).all(axis=1).sum())
    weight = len(pairs) + (len(objects) - len(pairs) + extra) / 2
    return sum(qualities) / weight if weight else None


def detections(results: list[dict]) -> Detections:
    """Results of one photo in COCO's format, without landmarks."""
    return Detections(
        image_id=results[0]["image_id"] if results else -1,
        boxes=np.array([r["bbox"] for r in results], dtype=float).reshape(-1, 4),
        scores=np.array([r["score"] for r in results], dtype=float),
        categories=np.array([r["category_id"] for r in results], dtype=int),
        landmarks={},
    )


def rank_photos(
    json_file: Path, results: list[dict], sigmas: np.ndarray
) -> list[tuple[int, float]]:
    """Ids and scores of the photos that have one, the best first."""
    data = json.loads(json_file.read_text())
    annotations, found = defaultdict(list), defaultdict(list)
    for entries, by_image in ((data["annotations"], annotations), (results, found)):
        for entry in entries:
            by_image[entry["image_id"]].append(entry)
    scores = {
        image["id"]: photo_score(
            annotations[image["id"]],
            found[image["id"]],
            (image["height"], image["width"]),
            sigmas,
        )
        for image in data["images"]
    }
    scored = [(number, score) for number, score in scores.items() if score is not None]
    return sorted(scored, key=lambda entry: -entry[1])


def draw_extremes(row: Row, output: Path, count: int) -> Path:
    """Draw ``count`` photos of the test set, half of them the best and half the worst.

    They are in ``pictures/{name}/best`` and ``worst`` below ``output``, truth left, predictions
    right, in order; ``scores.json`` has the score of every photo.

    Raises:
        UserError: drawing failed.
    """
    run = output / row.folder
    cfg = load_config(str(run / "config.yaml"), ["MODEL.DEVICE", "cpu"])
    name = cfg.DATASETS.TEST[0]
    predictions = run / "inference/coco_instances_results.json"
    json_file = Path(load_metadata(name).json_file)  # which tells the tolerances, too
    sigmas = np.array(oks_sigmas(cfg, name)[1])
    ranked = rank_photos(json_file, json.loads(predictions.read_text()), sigmas)
    best, worst = ranked[: (count + 1) // 2], ranked[::-1][: count // 2]
    title = slug(f"{row.group}_{title_of(row.name, row.point)}")
    folder = make_folder(output / "pictures" / title)
    with atomic_write(folder / "scores.json", "w") as file:
        json.dump([{"image_id": number, "score": score} for number, score in ranked], file)
    for part, chosen in (("best", best), ("worst", worst)):
        if not chosen:
            continue
        command = [sys.executable, str(ROOT / "tools/visualize_data.py")]
        command += ["--config-file", str(run / "config.yaml"), "--predictions", str(predictions)]
        command += ["--confidence-threshold", str(SCORE_FLOOR), "--output-dir", str(folder / part)]
        command += ["--image-ids", *(str(number) for number, _ in chosen)]
        command += ["--opts", "MODEL.DEVICE", "cpu"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise UserError(f"cannot draw {folder / part}: {done.stderr.strip().splitlines()[-1]}")
    return folder

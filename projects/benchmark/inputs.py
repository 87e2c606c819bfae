"""Images and objects for models to work on, drawn from a seed."""

import math
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.structures import Boxes, BoxMode, Instances, Keypoints, PolygonMasks

from lsnet_d2.data.polygons import polygons_to_rle

OBJECTS = 8  # an image; COCO has 7.3
VERTICES = 36
KEYPOINTS = 17


def ellipses(rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """Contours (count, VERTICES, 2) in pixels, from the top, with a side of at least 16 pixels."""
    size = rng.uniform(16, np.array([width, height]) * 0.6, (count, 1, 2))
    centre = rng.uniform(size / 2, np.array([width, height]) - size / 2)
    angle = np.arange(VERTICES)[:, None] / VERTICES * 2 * math.pi
    return centre + size / 2 * np.concatenate([-np.sin(angle), -np.cos(angle)], axis=1)


def picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8 that is neither flat nor noise."""
    coarse = rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return cv2.add(smooth, rng.integers(0, 16, smooth.shape, dtype=np.uint8))


def model_inputs(count: int, height: int, width: int, seed: int = 0) -> list[dict]:
    """Images with ground truth for every model here; classes are 0, the only one that all have."""
    rng = np.random.default_rng(seed)
    inputs = []
    for _ in range(count):
        contours = torch.from_numpy(ellipses(rng, OBJECTS, height, width)).float()
        instances = Instances((height, width))
        lower, upper = contours.amin(dim=1), contours.amax(dim=1)
        instances.gt_boxes = Boxes(torch.cat([lower, upper], dim=1))
        instances.gt_classes = torch.zeros(OBJECTS, dtype=torch.int64)
        instances.gt_extreme_points = contours[:, :: VERTICES // 4]
        instances.gt_contours = contours
        instances.gt_masks = PolygonMasks([[c.flatten().numpy()] for c in contours.double()])
        points = contours[:, :KEYPOINTS]
        visible = torch.full((OBJECTS, KEYPOINTS, 1), 2.0)
        instances.gt_keypoints = Keypoints(torch.cat([points, visible], dim=2))
        image = torch.from_numpy(picture(rng, height, width).transpose(2, 0, 1).copy())
        inputs.append({"image": image, "instances": instances, "height": height, "width": width})
    return inputs


def dataset_dicts(
    folder: Path, count: int, height: int = 480, width: int = 640, seed: int = 0
) -> list[dict]:
    """Images in files, with polygons, in Detectron2's format."""
    rng = np.random.default_rng(seed)
    dicts = []
    for number in range(count):
        path = folder / f"{number}.jpg"
        cv2.imwrite(str(path), picture(rng, height, width))
        contours = ellipses(rng, OBJECTS, height, width)
        annotations = [
            {
                "bbox": [*contour.min(axis=0).tolist(), *contour.max(axis=0).tolist()],
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": 0,
                "iscrowd": 0,
                "segmentation": [contour.flatten().tolist()],
            }
            for contour in contours
        ]
        dicts.append(
            {
                "file_name": str(path),
                "image_id": number,
                "height": height,
                "width": width,
                "annotations": annotations,
            }
        )
    return dicts


def crowd(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Boxes (count, 4) XYXY of 12 to 440 pixels, the small ones more frequent."""
    generator = torch.Generator().manual_seed(seed)
    size = 8 * torch.rand(count, 2, generator=generator).mul(4).exp() + 4
    centre = torch.rand(count, 2, generator=generator) * torch.tensor([width, height])
    limit = torch.tensor([width, height, width, height])
    return torch.cat([centre - size / 2, centre + size / 2], dim=1).clamp(min=0).minimum(limit)


def evaluated(images: int, height: int = 480, width: int = 640, seed: int = 0) -> tuple:
    """A COCO data set of 80 classes with masks, and results of which some are right."""
    rng = np.random.default_rng(seed)
    annotations, results = [], []
    for image in range(1, images + 1):
        contours = ellipses(rng, OBJECTS, height, width)
        classes = rng.integers(1, 81, OBJECTS).tolist()
        for contour, category in zip(contours, classes, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": category,
                    "bbox": to_xywh(contour),
                    "area": float(cv2.contourArea(contour.astype(np.float32))),
                    "iscrowd": 0,
                    "segmentation": [contour.flatten().tolist()],
                }
            )
        noise = rng.normal(size=(OBJECTS, 2, 1, 2)) * np.ptp(contours, axis=1)[:, None, None] / 10
        found = (contours[:, None] + noise).reshape(-1, *contours.shape[1:])
        rles = polygons_to_rle(found, height, width)
        scores = rng.uniform(size=len(found)).tolist()
        for contour, rle, score, category in zip(
            found, rles, scores, np.repeat(classes, 2).tolist(), strict=True
        ):
            results.append(
                {
                    "image_id": image,
                    "category_id": category,
                    "bbox": to_xywh(contour),
                    "segmentation": rle,
                    "score": score,
                }
            )
    dataset = {
        "info": {},
        "images": [{"id": i + 1, "height": height, "width": width} for i in range(images)],
        "categories": [{"id": i + 1, "name": str(i)} for i in range(80)],
        "annotations": annotations,
    }
    return dataset, results


def to_xywh(contour: np.ndarray) -> list[float]:
    return [*contour.min(axis=0).tolist(), *np.ptp(contour, axis=0).tolist()]

"""Images and objects for models to work on, drawn from a seed."""

import math
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.structures import Boxes, BoxMode, Instances, Keypoints, PolygonMasks

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

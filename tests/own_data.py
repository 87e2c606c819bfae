"""A data set as users have them: three classes, one with five keypoints, and masks."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (96, 128)  # height, width
KEYPOINTS = ["nose", "left_wing", "right_wing", "left_foot", "right_foot"]
CATEGORIES = [
    {"id": 10, "name": "ball"},
    {
        "id": 20,
        "name": "bird",
        "keypoints": KEYPOINTS,
        "skeleton": [[1, 2], [1, 3], [1, 4], [1, 5]],
    },
    {"id": 40, "name": "box"},
]
COLORS = {10: (220, 30, 30), 20: (30, 200, 30), 40: (40, 60, 230)}


def write_own_data(folder: Path, split: str, count: int) -> tuple[Path, Path]:
    """Write ``{split}.json`` and images in ``{split}/``; returns the two."""
    images, annotations = [], []
    (folder / split).mkdir(parents=True)
    generator = np.random.default_rng(len(split))
    for number in range(count):
        pixels = np.full((*SIZE, 3), 120, np.uint8)
        name = f"{number:03d}.jpg"
        for index, category in enumerate(CATEGORIES):
            x, y = 4 + 42 * index + int(generator.integers(6)), int(generator.integers(4, 50))
            w, h = 34, 40
            pixels[y : y + h, x : x + w] = COLORS[category["id"]]
            annotation = {
                "id": len(annotations) + 1,
                "image_id": number,
                "category_id": category["id"],
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": 0,
                "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
            }
            if "keypoints" in category:
                points = [(17, 5), (4, 20), (30, 20), (8, 36), (26, 36)]
                annotation["keypoints"] = [v for u, w in points for v in (x + u, y + w, 2)]
                annotation["num_keypoints"] = len(points)
            annotations.append(annotation)
        Image.fromarray(pixels).save(folder / split / name)
        images.append({"id": number, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
    path = folder / f"{split}.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES})
    )
    return path, folder / split

"""Annotation files, sound and damaged, and what reads them."""

import contextlib
import io
import json
import random
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from images import SIZE
from pycocotools import mask as mask_util

from lsnet_d2 import add_lsnet_config
from lsnet_d2.data.coco_json import read_coco_lists, register_lsnet_instances
from lsnet_d2.data.dataset_report import report_dataset
from lsnet_d2.loaders import build_mapper, load_training_data

NAME = "fuzzed"  # of the data set

NASTY = [
    *(None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1e-300, 1e300, -1e300, 2**31, 2**63, 10**400),
    *(float("nan"), float("inf"), -float("inf")),
    *("", " ", "0", "a" * 5000, "\u202e\U0001f984", "\ud800", "\0", "../../x", "/", "nan", "[]"),
    *([], {}, [[]], [[[]]], [{}], [None], [0], [1, 2], ["a"], {"a": 1}, [0] * 3, [0] * 1000),
    *([float("nan")] * 4, [1e308] * 4, [0, 0, 1e9, 1e9], [[0, 0]] * 3, [[1e308, 1, 2, 3, 4, 5]]),
    *({"size": [40, 56], "counts": "0"}, {"size": [40, 56], "counts": [2**40]}, {"counts": []}),
]


def sound_annotations() -> dict:
    """A file with all that the loader reads."""
    height, width = SIZE
    mask = np.zeros(SIZE, np.uint8, order="F")
    mask[5:25, 10:30] = 1
    compressed = mask_util.encode(mask)
    compressed["counts"] = compressed["counts"].decode("ascii")
    runs = np.diff(np.flatnonzero(np.diff(np.pad(mask.T.ravel(), 1, constant_values=2))))
    segmentations = [
        [[10, 5, 30, 5, 30, 25, 10, 25]],
        [[10, 5, 20, 5, 20, 15], [22.5, 12, 30, 12, 30, 25]],
        compressed,
        {"size": [height, width], "counts": runs.tolist()},
        None,
    ]
    annotations = [
        {
            "id": 10 * image + index,
            "image_id": image,
            "category_id": 3 + index % 2,
            "bbox": [10, 5, 20, 20],
            "area": 400,
            "iscrowd": int(index == 3),
            **({"segmentation": segmentation} if segmentation else {}),
            **({"keypoints": [12, 8, 2, 0, 0, 0, 20, 20, 1], "num_keypoints": 2}),
            **({"extreme_points": [20, 5, 10, 15, 20, 25, 30, 15, 20, 15]}),
        }
        for image in (1, 2)
        for index, segmentation in enumerate(segmentations)
    ]
    posed = {"keypoints": ["nose", "left_ear", "right_ear"], "skeleton": [[1, 2], [1, 3]]}
    images = [{"id": i, "file_name": f"{i}.png", "height": height, "width": width} for i in (1, 2)]
    categories = [{"id": 3, "name": "cat", **posed}, {"id": 4, "name": "dog", **posed}]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def damage_annotations(rng: random.Random) -> tuple[str, bytes]:
    """Which kind of damage it is, and the file."""
    data = sound_annotations()
    kind = rng.choice(["values", "values", "values", "keys", "nesting", "several", "text"])
    if kind == "text":
        return kind, damage_text(rng, json.dumps(data).encode())
    changes = {"values": [_nasty], "keys": [_delete, _repeat], "nesting": [_wrap, _swap, _unwrap]}
    changes["several"] = sum(changes.values(), [])
    for _ in range(rng.randint(2, 5) if kind == "several" else 1):
        parent, key = rng.choice(list(_places(data)))
        rng.choice(changes[kind])(rng, data, parent, key)
    return kind, json.dumps(data).encode("ascii")


def _places(value: object) -> list[tuple[dict | list, object]]:
    """All containers in ``value`` with all their keys."""
    found = []
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        found.append((value, key))
        if isinstance(value[key], (dict, list)):
            found += _places(value[key])
    return found


def _nasty(rng: random.Random, data: dict, parent: dict | list, key: object) -> None:
    parent[key] = json.loads(json.dumps(rng.choice(NASTY)))


def _delete(rng: random.Random, data: dict, parent: dict | list, key: object) -> None:
    del parent[key]


def _repeat(rng: random.Random, data: dict, parent: dict | list, key: object) -> None:
    if isinstance(parent, list):
        parent.insert(key, json.loads(json.dumps(parent[key])))
    else:
        parent[f"{key} "] = parent.pop(key)


def _wrap(rng: random.Random, data: dict, parent: dict | list, key: object) -> None:
    parent[key] = rng.choice([[parent[key]], {"a": parent[key]}, str(parent[key])])


def _unwrap(rng: random.Random, data: dict, parent: dict | list, key: object) -> None:
    inner = parent[key]
    if isinstance(inner, (list, dict)) and inner:
        parent[key] = inner[0] if isinstance(inner, list) else next(iter(inner.values()))


def _swap(rng: random.Random, data: dict, parent: dict | list, key: object) -> None:
    other, place = rng.choice(list(_places(data)))
    copies = [json.loads(json.dumps(value)) for value in (parent[key], other[place])]
    other[place] = copies[0]
    if key in parent if isinstance(parent, dict) else key < len(parent):
        parent[key] = copies[1]


def damage_text(rng: random.Random, content: bytes) -> bytes:
    """A JSON file that something else than a program has damaged."""
    place = rng.randrange(len(content))
    return rng.choice(
        [
            lambda: content[:place],
            lambda: b"",
            lambda: content[:place] + rng.randbytes(3) + content[place + 3 :],
            lambda: content.decode().encode(rng.choice(["utf-16", "utf-32", "utf-8-sig"])),
            lambda: b"[" * 100_000,
            lambda: b'{"images": ' + b'{"a": ' * 20_000 + b"1" + b"}" * 20_001,
            lambda: content.replace(b"20", b"1e999"),
            lambda: content.replace(b"20", b"9" * 5000),
            lambda: content.replace(b'"id": 1,', b'"id": 1, "id": 2,'),
            lambda: content + content,
            lambda: rng.randbytes(300),
        ]
    )()


def read_annotations(folder: Path, number: int) -> None:
    """As a training does."""
    cfg = _cfg(drop=bool(number % 2), annotated=bool(number // 2 % 2))
    DatasetCatalog.pop(NAME, None)
    MetadataCatalog.pop(NAME, None)
    register_lsnet_instances(NAME, folder / "fuzzed.json", folder / "images")
    with contextlib.redirect_stdout(io.StringIO()):
        records = load_training_data(cfg)
    mapper = build_mapper(cfg, is_train=True)
    for record in records:
        found = mapper(record)["instances"]
        fields = [found.gt_boxes.tensor, found.gt_extreme_points, found.gt_keypoints.tensor]
        if not all(field.isfinite().all() for field in fields):
            raise AssertionError("ground truth that is not finite")


def report_annotations(folder: Path, number: int) -> None:
    """As tools/check_dataset.py does."""
    report = report_dataset(read_coco_lists(folder / "fuzzed.json"), str(folder / "images"))
    json.dumps(report.repaired)
    list(map(str, report.problems))


def _cfg(drop: bool, annotated: bool) -> CfgNode:
    cfg = get_cfg()
    add_lsnet_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "LSNet"
    cfg.MODEL.LSNET.TASK = "joint"
    cfg.MODEL.LSNET.BRANCHES = ["extreme", "contour", "keypoint"]
    cfg.MODEL.LSNET.NUM_CLASSES = 2
    cfg.MODEL.LSNET.NUM_KEYPOINTS = 3
    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    cfg.INPUT.EXTREME_POINTS = "annotation" if annotated else "segmentation"
    cfg.DATASETS.TRAIN = (NAME,)
    cfg.DATASETS.INVALID_ANNOTATIONS = "drop" if drop else "error"
    return cfg

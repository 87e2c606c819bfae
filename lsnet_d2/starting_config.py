"""A config file to start with on a data set of one's own."""

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml
from detectron2.data.datasets.builtin_meta import COCO_PERSON_KEYPOINT_NAMES

from .config_file import merge_config
from .data.dataset_statistics import class_statistics
from .data.keypoints import skeleton_metadata
from .errors import ConfigError
from .evaluation import COCO_OKS_SIGMAS
from .solver import schedule_of_length

EPOCHS = 12  # COCO's 1x schedule
MIN_ITERATIONS = 1000  # less is too little to learn anything from weights of ImageNet
EVALUATIONS = 5  # during a training, the last at its end


@dataclass(frozen=True, kw_only=True)
class CocoFile:
    """
    Attributes:
        json_file: in COCO's format.
        image_root: the folder that its ``file_name`` start from.
        data: its content.
    """

    json_file: str
    image_root: str
    data: dict[str, Any]


def starting_config(
    path: str, *, train: CocoFile, test: CocoFile | None = None, base_config: str
) -> str:
    """The text of a config for one model of all that the objects have: boxes, contours, keypoints.

    The data sets get the file's name, with "_train" and "_val", and are registered by
    ``DATASETS.COCO_FILES``. Comments say what the file has for classes and for the skeleton, which
    are read from there. Keypoints that are neither COCO's people's nor have sigmas in the file get
    the mean of COCO's, written out. The training is as long as the number of images asks for, and
    where there are other data to evaluate on, the best checkpoint is kept.

    Args:
        path: where the file will be; it says where the base is, relative to itself.
        train: the data to learn from, without problems.
        test: those to evaluate on, with the same classes and keypoints. None: ``train``.
        base_config: an LSNet config, which has the rest.

    Raises:
        ConfigError: the two have different categories, or there is something wrong with the base.
    """
    categories = _categories(train.data)
    if test and _categories(test.data) != categories:
        raise ConfigError(
            f"{test.json_file} has other categories, or other keypoints, than {train.json_file}"
        )
    classes = class_statistics(train.data)
    name = os.path.splitext(os.path.basename(path))[0]
    lsnet: dict[str, Any] = {"TASK": "joint", "BRANCHES": ["extreme"], "NUM_CLASSES": len(classes)}
    if any(c.masks for c in classes):
        lsnet["BRANCHES"].append("contour")
    comments = [f"class {index}: {c.name}" for index, c in enumerate(classes)]
    skeleton = skeleton_metadata(train.data["categories"])
    solver, testing = _schedule(base_config, train.data)
    if test:
        testing["BEST_METRIC"] = "bbox/AP"
    if skeleton:
        lsnet["BRANCHES"].append("keypoint")
        lsnet["NUM_KEYPOINTS"] = len(skeleton["keypoint_names"])
        posed = [index for index, c in enumerate(categories) if c.get("keypoints")]
        lsnet["KEYPOINT_CLASSES"] = posed if len(posed) < len(classes) else []
        sigmas = _oks_sigmas(skeleton)
        testing |= sigmas
        comments += _describe_skeleton(skeleton, "mean of COCO's, below" if sigmas else "COCO's")
    if not test:
        comments.append("There are no other data to evaluate on: AP is that of the training data.")
    files = {f"{name}_train": train} | ({f"{name}_val": test} if test else {})
    config = {
        "_BASE_": os.path.relpath(base_config, os.path.dirname(os.path.abspath(path))),
        "MODEL": {"LSNET": lsnet},
        "DATASETS": {
            "COCO_FILES": [
                [key, os.path.abspath(file.json_file), os.path.abspath(file.image_root)]
                for key, file in files.items()
            ],
            "TRAIN": [f"{name}_train"],
            "TEST": [list(files)[-1]],
        },
        "SOLVER": solver,
        "TEST": testing,
        "OUTPUT_DIR": f"output/{name}",
    }
    comments.insert(
        0, f"A start for {os.path.basename(train.json_file)}; everything can be changed."
    )
    body = yaml.safe_dump(config, sort_keys=False, default_flow_style=None, allow_unicode=True)
    return "".join(f"# {comment}\n" for comment in comments) + body


def _schedule(base_config: str, data: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys of SOLVER and TEST that count iterations, for this number of images."""
    cfg = merge_config(base_config)
    images = len({annotation["image_id"] for annotation in data["annotations"]})
    iterations = max(math.ceil(EPOCHS * images / cfg.SOLVER.IMS_PER_BATCH), MIN_ITERATIONS)
    period = math.ceil(iterations / EVALUATIONS)
    solver = {
        key.removeprefix("SOLVER."): list(value) if isinstance(value, tuple) else value
        for key, value in schedule_of_length(cfg, iterations).items()
        if key.startswith("SOLVER.")
    }
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupCosineLR":
        solver.pop("STEPS", None)  # of no use to it
    # a warm-up protects the first steps, however many there are to come
    solver["WARMUP_ITERS"] = min(cfg.SOLVER.WARMUP_ITERS, iterations // 10)
    solver["CHECKPOINT_PERIOD"] = period
    return solver, {"EVAL_PERIOD": period}


def _categories(data: dict[str, Any]) -> list[dict]:
    """Category ids, names and keypoints, in the order of classes."""
    keys = ("id", "name", "keypoints")
    ordered = sorted(data["categories"], key=lambda category: category["id"])
    return [{key: category[key] for key in keys if category.get(key)} for category in ordered]


def _describe_skeleton(skeleton: dict[str, Any], sigmas_elsewhere: str) -> list[str]:
    """
    Args:
        sigmas_elsewhere: where OKS sigmas are from, unless the file has them.
    """
    names = enumerate(skeleton["keypoint_names"])
    pairs = [f"{left} - {right}" for left, right in skeleton["keypoint_flip_map"]]
    bones = [f"{start} - {end}" for start, end, _ in skeleton["keypoint_connection_rules"]]
    sigmas = skeleton.get("keypoint_oks_sigmas", [sigmas_elsewhere])
    return [
        f"keypoints: {', '.join(f'{index} {name}' for index, name in names)}",
        f"exchanged in a mirrored image: {', '.join(pairs) or 'none'}",
        f"skeleton: {', '.join(bones) or 'none'}",
        f"OKS sigmas: {', '.join(map(str, sigmas))}",
    ]


def _oks_sigmas(skeleton: dict[str, Any]) -> dict[str, list[float]]:
    """What the config must say where neither the file nor COCO knows the tolerances."""
    names = tuple(skeleton["keypoint_names"])
    if "keypoint_oks_sigmas" in skeleton or names == tuple(COCO_PERSON_KEYPOINT_NAMES):
        return {}
    return {"KEYPOINT_OKS_SIGMAS": [round(float(np.mean(COCO_OKS_SIGMAS)), 3)] * len(names)}

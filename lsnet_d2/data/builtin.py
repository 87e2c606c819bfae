"""Registers the shapes, COCO with all in one file, and the user's folders in Detectron2's catalogs.

Nothing is read or made at import: that happens when ``DatasetCatalog.get`` asks for a data set.
"""

import itertools
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from ..errors import ConfigError
from .coco_json import register_lsnet_instances
from .shapes import SPLITS, ensure_shapes, shapes_paths
from .shapes_objects import (
    CLASS_NAMES,
    KEYPOINT_CONNECTION_RULES,
    KEYPOINT_FLIP_MAP,
    KEYPOINT_NAMES,
    KEYPOINT_OKS_SIGMAS,
)

logger = logging.getLogger(__name__)

# How annotation files begin, and what stands between the folder and the split in names.
_KINDS = (("instances_", "_"), ("person_keypoints_", "_keypoints_"))
_LAYOUT = "{name}/annotations/instances_{split}.json with images in {name}/{split}/"


def _data_folder(root: str | os.PathLike | None) -> str:
    root = os.getenv("DETECTRON2_DATASETS", "datasets") if root is None else root
    return os.path.abspath(os.path.expanduser(root))


def register_folders(root: str | os.PathLike | None = None) -> list[str]:
    """Register every data set that lies in COCO's layout below a folder.

    ``{name}/annotations/instances_{split}.json`` with images in ``{name}/{split}/``, or where
    there is no such folder in ``{name}/images/``, becomes ``{name}_{split}``, and
    ``person_keypoints_{split}.json`` becomes ``{name}_keypoints_{split}``. Names that are
    registered stay as they are, with a warning where they stand for other files.

    Args:
        root: the folder; None: ``$DETECTRON2_DATASETS``, or "datasets".

    Returns:
        The names that were new.
    """
    names = []
    for json_file in sorted(Path(_data_folder(root)).glob("*/annotations/*.json")):
        for prefix, kind in _KINDS:
            if not json_file.stem.startswith(prefix):
                continue
            folder, split = json_file.parents[1], json_file.stem.removeprefix(prefix)
            images = next((p for p in (folder / split, folder / "images") if p.is_dir()), None)
            name = folder.name + kind + split
            if images is None:
                continue
            if name not in DatasetCatalog.list():
                register_lsnet_instances(name, json_file, images)
                names.append(name)
            elif MetadataCatalog.get(name).get("json_file") != str(json_file):
                logger.warning(
                    "%s is not registered: the name %s stands for another data set (%s); "
                    "rename the folder",
                    json_file,
                    name,
                    MetadataCatalog.get(name).get("json_file"),
                )
    return names


def register_coco_files(files: Sequence[Sequence[str]]) -> None:
    """Register the data sets of ``DATASETS.COCO_FILES``.

    A name that stands for other files, of an earlier config or of a folder, stands for these from
    now on, which is logged.

    Args:
        files: of each a name, the annotation file and the folder of its images.

    Raises:
        ConfigError: ``files`` is something else.
    """
    for entry in files:
        parts = list(entry) if isinstance(entry, (list, tuple)) else []
        if len(parts) != 3 or not all(isinstance(part, str) for part in parts):
            raise ConfigError(
                "DATASETS.COCO_FILES must list [name, annotation file, folder of images], not "
                f"{entry!r}"
            )
        name, json_file, image_root = parts[0], *map(os.path.expanduser, parts[1:])
        if name in DatasetCatalog.list():
            known = MetadataCatalog.get(name)
            if (known.get("json_file"), known.get("image_root")) == (json_file, image_root):
                continue
            logger.warning(
                "The data set %s is %s now, not %s", name, json_file, known.get("json_file")
            )
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        register_lsnet_instances(name, json_file, image_root)


def explain_unregistered(name: str, root: str | os.PathLike | None = None) -> str:
    """Why :func:`register_folders` did not register a name: what is missing, and where."""
    root = Path(_data_folder(root))
    folders = sorted(path for path in root.glob("*") if path.is_dir())
    # "birds_keypoints_val" is more likely the keypoints of "val" than a split "keypoints_val"
    for folder, (prefix, kind) in itertools.product(folders, reversed(_KINDS)):
        split = name.removeprefix(f"{folder.name}{kind}")
        if split == name:
            continue
        json_file = folder / "annotations" / f"{prefix}{split}.json"
        if not json_file.is_file():
            return f"there is no annotation file {json_file}"
        if not (folder / split).is_dir() and not (folder / "images").is_dir():
            return f"there is no folder of images {folder / split}"
    return f"no folder below {root} (DETECTRON2_DATASETS) has it as {_LAYOUT}"


def register_shapes(
    root: str | os.PathLike | None = None, *, prefix: str = "shapes", **parameters: int
) -> None:
    """Register ``<prefix>_train`` and ``<prefix>_val``; names that are registered stay as they are.

    Args:
        root: as in :func:`lsnet_d2.data.shapes.ensure_shapes`. Like D2's own data sets it is
            settled now: a later change of ``$DETECTRON2_DATASETS`` has no effect.
        prefix: of the two names.
        parameters: ``num_train``, ``num_val``, ``size``, ``seed`` of ``ensure_shapes``.

    Examples:
        >>> register_shapes("datasets/large", prefix="large_shapes", size=320)
    """
    root = _data_folder(root)
    for split in SPLITS:
        name = f"{prefix}_{split}"
        if name in DatasetCatalog.list():
            continue
        paths = shapes_paths(root)[split]

        def load(name: str = name, split: str = split) -> list[dict]:
            json_file, image_root = ensure_shapes(root, **parameters)[split]
            return load_coco_json(json_file, image_root, name)

        DatasetCatalog.register(name, load)
        MetadataCatalog.get(name).set(
            json_file=paths.json_file,
            image_root=paths.image_root,
            evaluator_type="coco",
            thing_classes=list(CLASS_NAMES),
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(CLASS_NAMES))},
            keypoint_names=list(KEYPOINT_NAMES),
            keypoint_flip_map=list(KEYPOINT_FLIP_MAP),
            keypoint_connection_rules=list(KEYPOINT_CONNECTION_RULES),
            keypoint_oks_sigmas=list(KEYPOINT_OKS_SIGMAS),
        )


def register_joint_coco(root: str | os.PathLike | None = None) -> None:
    """Register ``joint_coco_2017_{train,val}``: COCO's objects of all classes, people with
    keypoints. ``tools/merge_coco_keypoints.py`` makes the files, ``joint_{split}2017.json``."""
    folder = os.path.join(_data_folder(root), "coco")
    for split in SPLITS:
        name = f"joint_coco_2017_{split}"
        if name not in DatasetCatalog.list():
            json_file = os.path.join(folder, "annotations", f"joint_{split}2017.json")
            register_lsnet_instances(name, json_file, os.path.join(folder, f"{split}2017"))


register_shapes()
register_joint_coco()
register_folders()

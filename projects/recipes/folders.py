"""Folders of data in COCO's format, one or several, as one data set to train and one to test on."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plan import DataKey

from lsnet_d2.data.coco_json import read_coco_json
from lsnet_d2.errors import UserError
from lsnet_d2.files import atomic_write, make_folder

SPLITS = ("train", "val")


def find_split(folder: Path, annotations: str, split: str) -> tuple[Path, Path]:
    """The annotation file of a split and the folder of its images.

    ``annotations/{annotations}_{split}.json`` with images in ``{split}/`` or ``images/``, or COCO's
    ``annotations/{annotations}_{split}2017.json`` with images in ``{split}2017/``.

    Raises:
        UserError: there is no such file, or no images to it.
    """
    for name in (split, f"{split}2017"):
        json_file = folder / "annotations" / f"{annotations}_{name}.json"
        if not json_file.is_file():
            continue
        for images in (folder / name, folder / "images"):
            if images.is_dir():
                return json_file, images
        raise UserError(f"{json_file}: there is neither {folder / name} nor {folder / 'images'}")
    raise UserError(f"{folder}: no annotations/{annotations}_{split}.json, nor {split}2017.json")


def data_opts(
    folders: Sequence[Path], data: DataKey, output: Path, *, val: Sequence[Path] = ()
) -> list[str]:
    """``DATASETS.COCO_FILES``, and its value, for the folders of ``--data``.

    Of several folders, ``{split}.json`` with all of them is written to ``output``. The folders of
    ``--val-data``, where given, are those that "val" comes from.

    Raises:
        UserError: see :func:`find_split` and :func:`join_files`.
    """
    files = []
    for split in SPLITS:
        chosen = val if val and split == "val" else folders
        found = [find_split(folder.resolve(), data.annotations, split) for folder in chosen]
        json_file, images = found[0]
        if len(found) > 1:
            json_file = make_folder(output) / f"{split}.json"
            joined = json.dumps(join_files(found))
            with atomic_write(json_file, "w") as file:
                file.write(joined)
        files.append([f"{data.name}_{split}", str(json_file.resolve()), str(images)])
    return ["DATASETS.COCO_FILES", repr(files)]


def join_files(files: Sequence[tuple[Path, Path]]) -> dict[str, Any]:
    """The content of several annotation files as that of one, with new ids and absolute paths.

    Args:
        files: of each its path and the folder of its images.

    Raises:
        UserError: a file is not in COCO's format, or its categories are not those of the first.
    """
    joined: dict[str, Any] = {"images": [], "annotations": []}
    for json_file, folder in files:
        data = read_coco_json(json_file)
        if data["categories"] != joined.setdefault("categories", data["categories"]):
            raise UserError(f"{json_file}: its categories are not those of {files[0][0]}")
        ids = {}
        for image in data["images"]:
            ids[image["id"]] = len(joined["images"]) + 1
            path = os.path.join(folder, image["file_name"])
            joined["images"].append({**image, "id": ids[image["id"]], "file_name": path})
        for annotation in data["annotations"]:
            if annotation["image_id"] not in ids:
                continue  # of an image that is not in the file
            number = len(joined["annotations"]) + 1
            joined["annotations"].append(
                {**annotation, "id": number, "image_id": ids[annotation["image_id"]]}
            )
    return joined

#!/usr/bin/env python
"""Take the photos of this project, and the people on them, out of COCO 2017.

    python projects/people/take_photos.py /data/coco --output /data/people

photos.json says which they are. Photos are made smaller, to a long side of 448 pixels at most, and
annotations with them.
"""

import argparse
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as mask_util
from tqdm import tqdm

from lsnet_d2.data.coco_json import read_coco_json
from lsnet_d2.data.images import encode_image
from lsnet_d2.data.polygons import decode_rle
from lsnet_d2.errors import UserError, exit_on_user_error
from lsnet_d2.files import atomic_write, make_folder, require_new_file, require_writable

PHOTOS = Path(__file__).with_name("photos.json")
LONG_SIDE = 448
JPEG_QUALITY = 95


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "coco", type=Path, help="with annotations/person_keypoints_{train,val}2017.json and photos"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    return parser


def shrink_annotation(annotation: dict, scale: tuple[float, float], size: tuple[int, int]) -> dict:
    """What an annotation says of the smaller photo.

    Args:
        scale: of x and of y.
        size: (height, width) of the smaller photo.
    """
    x, y = scale
    result = dict(annotation)
    result["bbox"] = [
        round(v * s, 2) for v, s in zip(annotation["bbox"], (x, y, x, y), strict=True)
    ]
    result["area"] = annotation["area"] * x * y
    keypoints = np.array(annotation["keypoints"], dtype=float).reshape(-1, 3)
    labelled = keypoints[:, 2] > 0
    # COCO's keypoints are indices of pixels, whose middles are half a pixel farther
    keypoints[labelled, :2] = (keypoints[labelled, :2] + 0.5) * scale - 0.5
    result["keypoints"] = keypoints.reshape(-1).tolist()
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, dict):
        mask = Image.fromarray(decode_rle(segmentation, *segmentation["size"]).astype(np.uint8))
        mask = mask.resize(size[::-1], Image.Resampling.NEAREST)
        rle = mask_util.encode(np.asfortranarray(mask))
        result["segmentation"] = {**rle, "counts": rle["counts"].decode()}
    else:
        result["segmentation"] = [
            [round(v * (x, y)[i % 2], 2) for i, v in enumerate(part)] for part in segmentation
        ]
    return result


def shrink_photo(source: Path, target: Path) -> tuple[int, int]:
    """Write a photo with a long side of 448 pixels at most; returns its (width, height)."""
    with Image.open(source) as photo:
        ratio = min(LONG_SIDE / max(photo.size), 1)
        size = tuple(max(round(side * ratio), 1) for side in photo.size)
        smaller = photo.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    with atomic_write(target) as file:
        file.write(encode_image(smaller, "JPEG", quality=JPEG_QUALITY))
    return size


def take(data: dict[str, Any], ids: Iterable[int], photos: Path, output: Path) -> tuple[list, list]:
    """The images of these ids and their annotations, after the photos were written.

    Args:
        data: of COCO's file.
        photos, output: folders of COCO's photos, and of ours.

    Raises:
        UserError: a photo is not in the file, or not in the folder.
    """
    images, annotations = [], []
    by_id = {image["id"]: image for image in data["images"]}
    of_image = {number: [] for number in ids}
    if lacking := sorted(of_image.keys() - by_id.keys()):
        raise UserError(f"{photos}: {len(lacking)} photos are not in COCO's file: {lacking[:5]}")
    for annotation in data["annotations"]:
        of_image.get(annotation["image_id"], []).append(annotation)
    for number, objects in tqdm(of_image.items(), disable=None, desc=photos.name):
        image = by_id[number]
        source = photos / image["file_name"]
        if not source.is_file():
            raise UserError(f"{source}: no such photo")
        width, height = shrink_photo(source, output / image["file_name"])
        scale = width / image["width"], height / image["height"]
        images.append({**image, "width": width, "height": height})
        annotations += [shrink_annotation(a, scale, (height, width)) for a in objects]
    return images, annotations


@exit_on_user_error()
def main() -> None:
    args = get_parser().parse_args()
    images = make_folder(args.output / "images")
    folder = make_folder(args.output / "annotations")
    require_writable(images)
    splits = json.loads(PHOTOS.read_text())
    files = {split: folder / f"person_keypoints_{split}.json" for split in splits}
    for path in files.values():
        require_new_file(os.fspath(path))
    names = sorted({name for sources in splits.values() for name in sources})
    coco = {
        name: read_coco_json(args.coco / "annotations" / f"person_keypoints_{name}.json")
        for name in names
    }
    for split, sources in splits.items():
        content = {"images": [], "annotations": [], "categories": coco[names[0]]["categories"]}
        for name, ids in sources.items():
            taken = take(coco[name], ids, args.coco / name, images)
            content["images"] += taken[0]
            content["annotations"] += taken[1]
        with atomic_write(files[split], "w") as file:
            json.dump(content, file)
        print(
            f"{files[split]}: {len(content['images'])} photos, {len(content['annotations'])} people"
        )


if __name__ == "__main__":
    main()

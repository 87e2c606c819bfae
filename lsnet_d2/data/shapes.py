"""Writes the embedded ``shapes`` data set: JPEG scenes and COCO annotations, made from a seed.

Files, below ``$DETECTRON2_DATASETS/shapes`` (``datasets/shapes`` by default, as in D2)::

    train/000001.jpg ...  val/000001.jpg ...
    annotations/instances_train.json  annotations/instances_val.json
    shapes.json           the version of the generator and its parameters

Conventions are COCO's: boxes are XYWH, polygons in continuous coordinates (the top left pixel
covers [0, 1] x [0, 1]), keypoints in pixel indices (continuous minus 0.5; D2's loader adds it
again). Annotations describe what is *visible* of an object: polygons, or compressed RLE where there
is a hole, or uncompressed RLE for crowds. Every annotation has keypoints, all zero for objects
without any, since COCO's evaluation wants them alike.
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from iopath.common.file_io import file_lock
from PIL import Image
from pycocotools import mask as mask_util
from tqdm import tqdm

from ..errors import UserError
from ..files import atomic_write
from .images import encode_image
from .shapes_objects import CLASS_NAMES, KEYPOINT_CONNECTION_RULES, KEYPOINT_NAMES
from .shapes_scene import SUPERSAMPLING, Scene, draw_scene

logger = logging.getLogger(__name__)

GENERATOR_VERSION = 1  # to be raised by every change that alters a byte of the data
SPLITS = ("train", "val")
JPEG_QUALITY = 88

_TOLERANCE = 0.15  # how far (pixels) an outline may run from the mask's edge
_MIN_PART = 2.0  # smaller splinters of an object (pixels^2) are not outlined
_MAX_HOLES = 0.01  # share of an object that may be hole before polygons will not do


class ShapesSplit(NamedTuple):
    """Where a split lies: what D2's ``load_coco_json`` asks for."""

    json_file: str
    image_root: str


def shapes_paths(root: str | os.PathLike | None = None) -> dict[str, ShapesSplit]:
    """Paths of ``train`` and ``val`` below ``root`` (see :func:`ensure_shapes`); makes nothing."""
    folder = _dataset_folder(root)
    return {
        split: ShapesSplit(
            str(folder / "annotations" / f"instances_{split}.json"), str(folder / split)
        )
        for split in SPLITS
    }


def ensure_shapes(
    root: str | os.PathLike | None = None,
    *,
    num_train: int = 3000,
    num_val: int = 500,
    size: int = 160,
    seed: int = 0,
) -> dict[str, ShapesSplit]:
    """Make the data set unless it is there, and say where it lies.

    It appears as a whole or not at all, also when several processes ask for it at the same time:
    one makes it, the others wait. What exists is never overwritten.

    Args:
        root: folder that holds data sets, the default is ``$DETECTRON2_DATASETS``, else
            ``datasets``. The files go to ``root/shapes``.
        num_train, num_val: images of the two splits.
        size: side of the images, pixels.
        seed: a scene depends on it, its split and its number only. The same versions of NumPy,
            OpenCV and Pillow write the same bytes.

    Returns:
        ``{"train": ShapesSplit, "val": ShapesSplit}``.

    Raises:
        UserError: ``root/shapes`` is no folder or holds something else, or shapes made by another
            version or with other parameters; files of the data set have been removed or cannot
            be read; nothing can be written to ``root``.
        ValueError: a parameter is out of range.
    """
    folder = _dataset_folder(root)
    stamp = {
        "generator": GENERATOR_VERSION,
        "seed": seed,
        "size": size,
        "num_images": {"train": num_train, "val": num_val},
    }
    if not _is_made(folder, stamp):
        try:
            with file_lock(str(folder)):
                if not _is_made(folder, stamp):
                    _make(folder, stamp)
        except OSError as error:  # such as no folder, a full disk, no rights
            raise UserError(
                f"the shapes data set cannot be made in {folder.parent}: {error.strerror or error};"
                " choose another DETECTRON2_DATASETS"
            ) from error
    return shapes_paths(root)


def generate(
    folder: str | os.PathLike, split: str, *, num_images: int, size: int = 160, seed: int = 0
) -> ShapesSplit:
    """Write the images and the annotation file of one split into ``folder``, in place.

    :func:`ensure_shapes` is what users want; this is its working part.

    Raises:
        ValueError: unknown split, or a parameter out of range.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    if num_images < 1 or seed < 0:
        raise ValueError(f"need num_images >= 1 and seed >= 0, got {num_images} and {seed}")
    folder = Path(folder)
    json_file, image_root = folder / "annotations" / f"instances_{split}.json", folder / split
    image_root.mkdir(parents=True)
    json_file.parent.mkdir(exist_ok=True)

    images, annotations = [], []
    for number in tqdm(
        range(1, num_images + 1), desc=f"shapes {split}", unit="image", mininterval=2.0
    ):
        entropy = [seed, SPLITS.index(split), number]
        scene = draw_scene(np.random.Generator(np.random.PCG64(entropy)), size)
        file_name = f"{number:06d}.jpg"
        content = encode_image(Image.fromarray(scene.image), "JPEG", quality=JPEG_QUALITY)
        (image_root / file_name).write_bytes(content)
        images.append({"id": number, "file_name": file_name, "width": size, "height": size})
        for annotation in scene_annotations(scene):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, **annotation},
            )
    content = {
        "info": {"description": "shapes: synthetic scenes", "version": str(GENERATOR_VERSION)},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": coco_categories(),
    }
    _write_json(json_file, content)
    return ShapesSplit(str(json_file), str(image_root))


def coco_categories() -> list[dict[str, Any]]:
    """The ``categories`` of the annotation files; ids count from 1."""
    categories: list[dict[str, Any]] = [
        {"id": number, "name": name, "supercategory": "shape"}
        for number, name in enumerate(CLASS_NAMES, start=1)
    ]
    categories[CLASS_NAMES.index("figure")] |= {
        "keypoints": list(KEYPOINT_NAMES),
        "skeleton": [
            [1 + KEYPOINT_NAMES.index(end) for end in bone[:2]]
            for bone in KEYPOINT_CONNECTION_RULES
        ],
    }
    return categories


def scene_annotations(scene: Scene) -> list[dict[str, Any]]:
    """COCO annotations of a scene's objects, from back to front, without ids."""
    annotations = []
    for index, thing in enumerate(scene.objects):
        mask = scene.visible_mask(index)
        polygons, holes = mask_polygons(mask)
        if thing.is_crowd or holes > _MAX_HOLES * thing.visible_area:
            coverage = cv2.resize(
                mask.astype(np.float32), scene.image.shape[:2], interpolation=cv2.INTER_AREA
            )
            bitmap = np.asfortranarray(coverage >= 0.5, dtype=np.uint8)
            rle = mask_util.encode(bitmap)
            box = mask_util.toBbox(rle).tolist()
            if thing.is_crowd:
                segmentation = {"size": list(bitmap.shape), "counts": _run_lengths(bitmap)}
            else:
                segmentation = {**rle, "counts": rle["counts"].decode("ascii")}
        else:
            points = np.concatenate(polygons)
            low, high = points.min(axis=0), points.max(axis=0)
            box = np.round([*low, *(high - low)], 2).tolist()
            segmentation = [polygon.ravel().tolist() for polygon in polygons]
        keypoints = np.zeros((len(KEYPOINT_NAMES), 3))
        if thing.keypoints is not None:
            keypoints = thing.keypoints.copy()
            keypoints[keypoints[:, 2] > 0, :2] -= 0.5
        annotations.append(
            {
                "category_id": CLASS_NAMES.index(thing.class_name) + 1,
                "iscrowd": int(thing.is_crowd),
                "bbox": box,
                "area": round(thing.visible_area, 2),
                "segmentation": segmentation,
                "num_keypoints": int((keypoints[:, 2] > 0).sum()),
                "keypoints": np.round(keypoints, 2).ravel().tolist(),
            }
        )
    return annotations


def mask_polygons(fine_mask: np.ndarray) -> tuple[list[np.ndarray], float]:
    """Outlines of a mask on the fine grid.

    Args:
        fine_mask: (S * h, S * w) uint8, 0 or 1, with S = ``SUPERSAMPLING``; not empty.

    Returns:
        the outer outlines, each (n, 2) in image pixels, largest first, splinters left out; and the
        area of the holes inside them, image pixels.
    """
    left, top, width, height = cv2.boundingRect(fine_mask)
    mask = fine_mask[top : top + height, left : left + width]
    # Trace the middles of the pixels' outer edges: neither the centres of the border pixels nor
    # their outer corners will do, a thin object would lose or gain by it. On a grid of twice the
    # resolution, centres are odd-odd, middles of edges odd-even, and corners even-even.
    padded = np.pad(mask, 1)
    grid = np.zeros((2 * height + 1, 2 * width + 1), np.uint8)
    grid[1::2, 1::2] = mask
    grid[1::2, 0::2] = padded[1:-1, 1:] | padded[1:-1, :-1]
    grid[0::2, 1::2] = padded[1:, 1:-1] | padded[:-1, 1:-1]
    touching = padded[1:, 1:] + padded[1:, :-1] + padded[:-1, 1:] + padded[:-1, :-1]
    grid[0::2, 0::2] = touching >= 2
    scale = 2 * SUPERSAMPLING
    outlines, hierarchy = cv2.findContours(grid, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    is_hole = hierarchy[0, :, 3] >= 0
    polygons, holes = [], 0.0
    for outline, hole in zip(outlines, is_hole, strict=True):
        if hole:
            holes += cv2.contourArea(outline) / scale**2
            continue
        outline = cv2.approxPolyDP(outline, _TOLERANCE * scale, closed=True)
        if len(outline) >= 3:
            polygons.append(outline[:, 0] / scale + np.array([left, top]) / SUPERSAMPLING)
    polygons.sort(key=_polygon_area, reverse=True)
    kept = [p for p in polygons if _polygon_area(p) >= _MIN_PART]
    return kept or polygons[:1], holes


def _polygon_area(polygon: np.ndarray) -> float:
    return cv2.contourArea(polygon.astype(np.float32))


def _run_lengths(bitmap: np.ndarray) -> list[int]:
    """COCO's uncompressed counts: runs down the columns, the first one of zeros."""
    pixels = np.concatenate([[0], bitmap.ravel(order="F")])
    changes = np.flatnonzero(np.diff(pixels))
    return np.diff([0, *changes, bitmap.size]).tolist()


def _dataset_folder(root: str | os.PathLike | None) -> Path:
    if root is None:
        root = os.getenv("DETECTRON2_DATASETS", "datasets")
    return Path(root).expanduser().absolute() / "shapes"


def _is_made(folder: Path, stamp: dict[str, Any]) -> bool:
    """Whether ``folder`` holds the wanted data set; False where there is none at all."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    stamp_file = folder / "shapes.json"
    if not stamp_file.is_file():
        raise UserError(
            f"{folder} is in the way of the shapes data set: "
            f"{'no shapes.json in it' if folder.is_dir() else 'it is no folder'}; "
            "move it away, or choose another DETECTRON2_DATASETS"
        )
    try:
        found = json.loads(stamp_file.read_text())
    except ValueError as error:
        raise UserError(
            f"{stamp_file} is not valid JSON: {error}; remove {folder} to have it made anew"
        ) from error
    if found != stamp:
        raise UserError(
            f"{folder} was made as {found}, wanted is {stamp}; "
            "remove the folder to have it made anew, or choose another DETECTRON2_DATASETS"
        )
    for split, number in stamp["num_images"].items():
        json_file = folder / "annotations" / f"instances_{split}.json"
        present = len(list((folder / split).glob("*.jpg")))
        if not json_file.is_file() or present != number:
            raise UserError(
                f"{folder} is incomplete: {present} of {number} images in {split}/, "
                f"{json_file.name} {'present' if json_file.is_file() else 'missing'}; "
                "remove the folder to have it made anew"
            )
    return True


def _make(folder: Path, stamp: dict[str, Any]) -> None:
    """Build beside ``folder`` and move into place; the caller holds the lock."""
    for stale in folder.parent.glob(f".{folder.name}-*.tmp"):
        shutil.rmtree(stale)
    numbers = stamp["num_images"]
    logger.info("Making the shapes data set in %s: %s images", folder, sum(numbers.values()))
    building = folder.with_name(f".{folder.name}-{os.getpid()}.tmp")
    try:
        for split, number in numbers.items():
            generate(building, split, num_images=number, size=stamp["size"], seed=stamp["seed"])
        _write_json(building / "shapes.json", stamp)
        if folder.exists():
            folder.rmdir()  # empty: _is_made() found nothing in it
        os.replace(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_json(path: Path, content: Any) -> None:
    with atomic_write(path, "w") as file:
        json.dump(content, file, separators=(",", ":"))

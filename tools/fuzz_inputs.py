#!/usr/bin/env python
"""Damage annotation files and images in many ways, and see what reading them does.

Each input must be handled, or refused with a message that names it. The exit status is 1 where one
crashes or hangs, and where a message does not say which file it is about.
"""

import argparse
import contextlib
import io
import json
import logging
import multiprocessing
import os
import random
import struct
import sys
import tempfile
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import ExifTags, Image
from pycocotools import mask as mask_util

from lsnet_d2 import add_lsnet_config
from lsnet_d2.data.coco_json import read_coco_lists, register_lsnet_instances
from lsnet_d2.data.dataset_report import report_dataset
from lsnet_d2.data.images import read_image, read_image_size
from lsnet_d2.engine import build_mapper, load_training_data
from lsnet_d2.errors import UserError

HANDLED, REFUSED, CRASHED, HUNG = "handled", "refused", "crashed", "hung"
OUTCOMES = (HANDLED, REFUSED, CRASHED, HUNG)
NAME = "fuzzed"  # of the data set
SIZE = (40, 56)  # height, width

# --- annotations

NASTY = [
    *(None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1e-300, 1e300, -1e300, 2**31, 2**63, 10**40),
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


# --- images


def sound_image(rng: random.Random) -> bytes:
    """One of the kinds of images there are."""
    height, width = SIZE
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (height, width, 4))
    image = Image.fromarray(pixels.astype(np.uint8))
    file_format, mode = rng.choice(
        [
            *(("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
            *(("PNG", mode) for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")),
            *(("TIFF", mode) for mode in ("RGB", "I;16", "F", "I", "CMYK", "LAB")),
            *(("BMP", "RGB"), ("BMP", "P"), ("GIF", "P"), ("WEBP", "RGB"), ("PPM", "RGB")),
        ]
    )
    if mode == "I;16":
        image = Image.fromarray((pixels[..., 0] * 256 + pixels[..., 1]).astype(np.uint16))
    elif mode in ("LAB", "LA"):
        image = image.convert("RGB" if mode == "LAB" else "L").convert("RGB").convert("LA")
        image = Image.merge("LAB", [image.getchannel(0)] * 3) if mode == "LAB" else image
    else:
        image = image.convert("RGB").convert(mode)
    options = {}
    if file_format in ("JPEG", "PNG", "WEBP"):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = rng.randrange(10)
        options["exif"] = exif
    if file_format == "JPEG":
        options |= {"progressive": rng.random() < 0.5, "quality": rng.choice([5, 90])}
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def damage_image(rng: random.Random) -> tuple[str, bytes]:
    """Which kind of damage it is, and the file."""
    content = sound_image(rng)
    place = rng.randrange(len(content))
    kind = rng.choice(["none", "cut short", "bits", "head", "huge", "zeros", "joined", "empty"])
    if kind == "cut short":
        content = content[:place]
    elif kind in ("bits", "head"):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 12)):
            damaged[rng.randrange(min(len(damaged), 64 if kind == "head" else 10**9))] ^= (
                1 << rng.randrange(8)
            )
        content = bytes(damaged)
    elif kind == "huge":
        content = declare_huge(rng, content)
    elif kind == "zeros":
        content = content[:place] + bytes(len(content) - place)
    elif kind == "joined":
        content = content[:place] + sound_image(rng)[rng.randrange(64) :]
    elif kind == "empty":
        content = rng.choice([b"", b"\0", bytes(5000), b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe1"])
    return kind, content


def declare_huge(rng: random.Random, content: bytes) -> bytes:
    """A small file that claims to be a large image."""
    side = rng.choice([2**13, 30_000, 65_500, 2**20, 2**31 - 1])
    if content.startswith(b"\x89PNG") or rng.random() < 0.4:
        rows = zlib.compress(bytes(rng.choice([100, 10**6])), 9)
        head = struct.pack(">IIBBBBB", side, rng.choice([1, side]), 8, 0, 0, 0, 0)
        chunks = [(b"IHDR", head), (b"IDAT", rows), (b"IEND", b"")]
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in chunks
        )
    short = min(side, 65_500)
    for size in (struct.pack(">HH", *SIZE), struct.pack("<HH", *SIZE[::-1])):  # JPEG; GIF
        content = content.replace(size, struct.pack(">HH", short, short), 1)
    for size in (struct.pack("<ii", *SIZE[::-1]),):  # BMP
        content = content.replace(size, struct.pack("<ii", side, side), 1)
    return content.replace(b"56 40", f"{side} {side}".encode(), 1)  # PPM


def read_one_image(folder: Path, number: int) -> None:
    """As the mapper and the checks do."""
    file = str(folder / "fuzzed.img")
    pixels = read_image(file, ("BGR", "RGB")[number % 2])
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise AssertionError(f"an array of {pixels.dtype} and shape {pixels.shape}")
    if read_image_size(file) != pixels.shape[:2]:
        raise AssertionError(f"size {read_image_size(file)}, but pixels {pixels.shape[:2]}")


# --- running

PARTS: dict[str, tuple[Callable, str, Callable]] = {
    "annotations": (damage_annotations, "fuzzed.json", read_annotations),
    "reports": (damage_annotations, "fuzzed.json", report_annotations),
    "images": (damage_image, "fuzzed.img", read_one_image),
}


def make_input(part: str, seed: int, number: int) -> tuple[str, bytes]:
    """Kind and content of one input, which depend on the arguments alone."""
    return PARTS[part][0](random.Random(f"{part} {seed} {number}"))


def try_input(folder: Path, part: str, seed: int, number: int) -> tuple[str, str]:
    """Outcome, and what was said about it."""
    _, file_name, read = PARTS[part]
    (folder / file_name).write_bytes(make_input(part, seed, number)[1])
    try:
        read(folder, number)
    except UserError as error:
        named = any(name in str(error) for name in (file_name, "1.png", "2.png"))
        return (REFUSED, str(error)) if named else (CRASHED, f"no file is named: {error}")
    except Exception:
        return CRASHED, traceback.format_exc()
    return HANDLED, ""


def work(connection: Connection, folder: Path, seed: int) -> None:
    """Try what is asked for, in a process of its own, which may die of it."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    while True:
        part, number = connection.recv()
        connection.send(try_input(folder, part, seed, number))


class Worker:
    """A process that tries inputs, and another one when that has died or hangs."""

    def __init__(self, folder: Path, seed: int, patience: float) -> None:
        self._arguments, self._patience = (folder, seed), patience
        self._start()

    def _start(self) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("fork").Process(
            target=work, args=(theirs, *self._arguments), daemon=True
        )
        self._process.start()
        theirs.close()

    def ask(self, part: str, number: int) -> tuple[str, str]:
        self._connection.send((part, number))
        if self._connection.poll(self._patience):
            try:
                return self._connection.recv()
            except EOFError:
                self._process.join()
                outcome = CRASHED, f"the process died: exit code {self._process.exitcode}"
        else:
            outcome = HUNG, f"no answer in {self._patience:g} seconds"
        self.stop()
        self._start()
        return outcome

    def stop(self) -> None:
        self._process.kill()
        self._process.join()


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--annotations", type=int, default=1500, help="annotation files")
    parser.add_argument("--reports", type=int, default=500, help="annotation files to report on")
    parser.add_argument("--images", type=int, default=1000, help="images")
    parser.add_argument("--seed", type=int, default=0, help="of the damage")
    parser.add_argument("--patience", type=float, default=20, help="seconds an input may take")
    parser.add_argument("--keep", metavar="FOLDER", help="write inputs that fail into a folder")
    return parser


def main() -> int:
    args = get_parser().parse_args()
    counts, failures = {}, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        for image in (1, 2):
            Image.new("RGB", SIZE[::-1], (90, 60 * image, 30)).save(folder / f"images/{image}.png")
        worker = Worker(folder, args.seed, args.patience)
        for part in PARTS:
            for number in range(getattr(args, part)):
                outcome, text = worker.ask(part, number)
                kind, content = make_input(part, args.seed, number)
                counts.setdefault((part, kind), Counter())[outcome] += 1
                if outcome in (CRASHED, HUNG):
                    failures.append((part, kind, number, outcome, text))
                    if args.keep:
                        os.makedirs(args.keep, exist_ok=True)
                        Path(args.keep, f"{part}_{args.seed}_{number}").write_bytes(content)
        worker.stop()
    for part, kind, number, outcome, text in failures:
        print(f"{part} {number} ({kind}) {outcome}: {text}", file=sys.stderr)
    print_table(counts)
    return 1 if failures else 0


def print_table(counts: dict[tuple[str, str], Counter]) -> None:
    rows = sorted((*key, found) for key, found in counts.items())
    print("| inputs | damage | tried | " + " | ".join(OUTCOMES) + " |")
    print("| --- " * (3 + len(OUTCOMES)) + "|")
    rows.append(("all", "", sum(counts.values(), Counter())))
    for part, kind, found in rows:
        cells = [part, kind, found.total(), *(found[outcome] for outcome in OUTCOMES)]
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    sys.exit(main())

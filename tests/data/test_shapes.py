"""The shapes data set: geometry of its annotations, determinism, and behaviour on disk."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.detection_utils import create_keypoint_hflip_indices
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from lsnet_d2.data import builtin
from lsnet_d2.data.shapes import (
    ShapesSplit,
    ensure_shapes,
    generate,
    mask_polygons,
    scene_annotations,
    shapes_paths,
)
from lsnet_d2.data.shapes_objects import (
    CLASS_NAMES,
    KEYPOINT_FLIP_MAP,
    KEYPOINT_NAMES,
    KEYPOINT_OKS_SIGMAS,
    MIN_EXTENTS,
    random_outline,
)
from lsnet_d2.data.shapes_scene import (
    MIN_VISIBLE,
    MIN_VISIBLE_AREA,
    SUPERSAMPLING,
    Scene,
    draw_scene,
)
from lsnet_d2.errors import UserError

NUM_TRAIN, NUM_VAL, SIZE = 12, 3, 128
SMALL = {"num_train": NUM_TRAIN, "num_val": NUM_VAL, "size": SIZE}
ROOT_OF_PROJECT = Path(__file__).resolve().parents[2]


def rng_of(*entropy: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(entropy))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("datasets")
    ensure_shapes(folder, **SMALL)
    return folder


@pytest.fixture(scope="module")
def coco(root: Path) -> COCO:
    return COCO(shapes_paths(root)["train"].json_file)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(rng_of(7, number), 160) for number in range(100)]


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def polygon_mask(polygons: list[list[float]], size: int, scale: int = 1) -> np.ndarray:
    scaled = [[value * scale for value in polygon] for polygon in polygons]
    rles = mask_util.frPyObjects(scaled, size * scale, size * scale)
    return mask_util.decode(mask_util.merge(rles)).astype(bool)


def mask_iou(first: np.ndarray, second: np.ndarray) -> float:
    return (first & second).sum() / (first | second).sum()


# --- annotations against what was drawn


def test_polygons_follow_the_visible_mask(scenes: list[Scene]) -> None:
    compared = 0
    for scene in scenes:
        for index, annotation in enumerate(scene_annotations(scene)):
            if isinstance(annotation["segmentation"], dict) or max(annotation["bbox"][2:]) < 24:
                continue
            drawn = scene.visible_mask(index).astype(bool)
            outlined = polygon_mask(annotation["segmentation"], 160, SUPERSAMPLING)
            assert mask_iou(drawn, outlined) >= 0.97
            compared += 1
    assert compared > 150


def test_rle_is_used_for_holes_and_crowds_and_follows_the_mask(scenes: list[Scene]) -> None:
    crowds, rings = 0, 0
    for scene in scenes:
        for index, annotation in enumerate(scene_annotations(scene)):
            segmentation = annotation["segmentation"]
            thing = scene.objects[index]
            uncut_ring = thing.class_name == "ring" and thing.visible_area == thing.area
            assert isinstance(segmentation, dict) or not (uncut_ring or thing.is_crowd)
            if isinstance(segmentation, list):
                continue
            assert segmentation["size"] == [160, 160]
            if thing.is_crowd:
                assert annotation["iscrowd"] == 1
                segmentation = mask_util.frPyObjects(segmentation, 160, 160)
            bitmap = mask_util.decode(segmentation)
            fine = np.kron(bitmap, np.ones((SUPERSAMPLING,) * 2, np.uint8)).astype(bool)
            assert mask_iou(fine, scene.visible_mask(index).astype(bool)) > 0.6
            assert annotation["area"] == pytest.approx(bitmap.sum(), rel=0.1, abs=8)
            assert annotation["bbox"] == list(cv2.boundingRect(bitmap))
            crowds += thing.is_crowd
            rings += uncut_ring
    assert crowds >= 1
    assert rings >= 20


def test_boxes_and_areas_are_those_of_the_polygons(coco: COCO) -> None:
    compared = 0
    for annotation in coco.anns.values():
        if isinstance(annotation["segmentation"], dict):
            continue
        points = np.concatenate([np.reshape(p, (-1, 2)) for p in annotation["segmentation"]])
        x, y, w, h = annotation["bbox"]
        np.testing.assert_allclose([x, y], points.min(axis=0), atol=0.011)
        np.testing.assert_allclose([x + w, y + h], points.max(axis=0), atol=0.011)
        assert 0 <= x < x + w <= SIZE
        assert 0 <= y < y + h <= SIZE
        area = sum(
            cv2.contourArea(np.reshape(p, (-1, 1, 2)).astype(np.float32))
            for p in annotation["segmentation"]
        )
        assert area == pytest.approx(annotation["area"], rel=0.06, abs=4)
        compared += 1
    assert compared > 20


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    centre=st.tuples(st.floats(20, 44), st.floats(20, 44)),
    axes=st.tuples(st.floats(6, 19), st.floats(6, 19)),
    angle=st.floats(0, 180),
    hole=st.booleans(),
)
def test_mask_polygons_of_ellipses(
    centre: tuple[float, float], axes: tuple[float, float], angle: float, hole: bool
) -> None:
    ys, xs = (np.mgrid[: 64 * SUPERSAMPLING, : 64 * SUPERSAMPLING] + 0.5) / SUPERSAMPLING
    xs, ys, turn = xs - centre[0], ys - centre[1], np.deg2rad(angle)
    along, across = xs * np.cos(turn) + ys * np.sin(turn), ys * np.cos(turn) - xs * np.sin(turn)
    radius = np.hypot(along / axes[0], across / axes[1])
    mask = (radius <= 1) & ((radius > 0.5) | (not hole))
    polygons, hole_area = mask_polygons(mask.astype(np.uint8))
    assert len(polygons) == 1
    area = np.pi * axes[0] * axes[1]
    assert hole_area == pytest.approx(area / 4 if hole else 0, rel=0.05)
    assert cv2.contourArea(polygons[0].astype(np.float32)) == pytest.approx(area, rel=0.02)
    np.testing.assert_allclose(polygons[0].mean(axis=0), centre, atol=3)
    reach = np.hypot(np.array(axes) * np.cos(turn), np.array(axes)[::-1] * np.sin(turn))
    np.testing.assert_allclose(polygons[0].min(axis=0), centre - reach, atol=0.3)
    np.testing.assert_allclose(polygons[0].max(axis=0), centre + reach, atol=0.3)


def test_mask_polygons_are_exact_for_a_rectangle_and_drop_splinters() -> None:
    mask = np.zeros((40, 40), np.uint8)
    mask[8:24, 12:36] = 1
    mask[30, 4:8] = 1  # a quarter of a pixel in area
    polygons, holes = mask_polygons(mask)
    assert holes == 0
    assert len(polygons) == 1
    np.testing.assert_allclose(polygons[0].min(axis=0), [3, 2])
    np.testing.assert_allclose(polygons[0].max(axis=0), [9, 6])


def test_a_perfect_detector_scores_one(coco: COCO) -> None:
    real = [{**a, "segmentation": coco.annToRLE(a)} for a in coco.anns.values() if not a["iscrowd"]]
    for task, key in (("bbox", "bbox"), ("segm", "segmentation"), ("keypoints", "keypoints")):
        chosen = [a for a in real if task != "keypoints" or a["num_keypoints"]]
        results = [
            {k: a[k] for k in ("image_id", "category_id", key)} | {"score": 1.0} for a in chosen
        ]
        evaluation = COCOeval(coco, coco.loadRes(results), task)
        if task == "keypoints":
            evaluation.params.kpt_oks_sigmas = np.array(KEYPOINT_OKS_SIGMAS)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert evaluation.stats[0] == pytest.approx(1.0), task


# --- scenes


def test_scenes_have_the_promised_mixture(scenes: list[Scene]) -> None:
    things = [thing for scene in scenes for thing in scene.objects if not thing.is_crowd]
    assert 4 <= len(things) / len(scenes) <= 5.5
    assert 1 <= sum(not scene.objects for scene in scenes) <= 6
    counts = [sum(thing.class_name == name for thing in things) for name in CLASS_NAMES]
    assert min(counts) > 0.1 * len(things)
    for thing in things:
        assert thing.visible_area >= max(MIN_VISIBLE * thing.area, MIN_VISIBLE_AREA) - 1e-6
    assert 0.15 < np.mean([thing.visible_area < thing.area for thing in things]) < 0.5
    visibility = np.concatenate([t.keypoints[:, 2] for t in things if t.keypoints is not None])
    shares = [np.mean(visibility == value) for value in (0, 1, 2)]
    assert shares[0] > 0
    assert shares[1] > 0.02
    assert shares[2] > 0.8


def test_visible_areas_are_those_of_the_owner_map(scenes: list[Scene]) -> None:
    for scene in scenes[:20]:
        counts = np.bincount(scene.owner.ravel(), minlength=len(scene.objects) + 1)
        for count, thing in zip(counts[1:], scene.objects, strict=True):
            assert count / SUPERSAMPLING**2 == pytest.approx(thing.visible_area)


def test_keypoint_visibility_agrees_with_the_owner_map(scenes: list[Scene]) -> None:
    seen = 0
    for scene in scenes:
        for index, thing in enumerate(scene.objects):
            if thing.keypoints is None:
                continue
            for x, y, visible in thing.keypoints:
                if visible == 0:
                    assert (x, y) == (0, 0)
                    continue
                owner = scene.owner[int(y * SUPERSAMPLING), int(x * SUPERSAMPLING)]
                assert visible == 1 or owner == index + 1
                seen += 1
    assert seen > 500


@pytest.mark.parametrize("class_name", CLASS_NAMES)
@pytest.mark.parametrize("extent", [12.0, 33.3, 80.0])
def test_outlines_have_the_wanted_extent(class_name: str, extent: float) -> None:
    for number in range(10):
        x0, y0, x1, y1 = random_outline(rng_of(number), class_name, extent).box()
        assert max(x1 - x0, y1 - y0) == pytest.approx(extent)
        np.testing.assert_allclose([x0 + x1, y0 + y1], 0, atol=1e-9)


def test_left_and_right_follow_from_the_view() -> None:
    """Facing us, a figure has its left on our right, whichever way it is turned."""
    joint = {name: index for index, name in enumerate(KEYPOINT_NAMES)}
    views = set()
    for number in range(50):
        outline = random_outline(rng_of(number), "figure", 60)
        front = any(part.name == "tie" for part in outline.parts)
        for name in ("shoulder", "hip"):
            right, left = (outline.keypoints[joint[f"{s}_{name}"]] for s in ("right", "left"))
            up = outline.keypoints[joint["head"]] - (left + right) / 2
            across = left - right
            assert (across[0] * -up[1] + across[1] * up[0] > 0) == front
        views.add(front)
    assert views == {True, False}


@pytest.mark.parametrize("size", [64, 97, 320])
def test_other_sizes_work(size: int) -> None:
    scene = draw_scene(rng_of(3, size), size)
    assert scene.image.shape == (size, size, 3)
    assert scene.image.dtype == np.uint8
    assert scene.owner.shape == (size * SUPERSAMPLING,) * 2


def test_too_small_scenes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 64"):
        draw_scene(rng_of(0), 63)


# --- on disk


def test_same_bytes_every_time_and_no_image_depends_on_another(root: Path, tmp_path: Path) -> None:
    ensure_shapes(tmp_path, **SMALL)
    made = contents(root / "shapes")
    assert made == contents(tmp_path / "shapes")
    assert len(made) == NUM_TRAIN + NUM_VAL + 3

    fewer = generate(tmp_path / "fewer", "train", num_images=5, size=SIZE)
    for image in sorted(Path(fewer.image_root).iterdir()):
        assert image.read_bytes() == made[f"train/{image.name}"]
    annotations = json.loads(Path(fewer.json_file).read_text())["annotations"]
    complete = json.loads(made["annotations/instances_train.json"])["annotations"]
    assert annotations == complete[: len(annotations)]
    assert len(annotations) > 5

    other = generate(tmp_path / "other", "train", num_images=1, size=SIZE, seed=1)
    assert (Path(other.image_root) / "000001.jpg").read_bytes() != made["train/000001.jpg"]
    assert made["val/000001.jpg"] != made["train/000001.jpg"]


def test_what_exists_is_kept_and_only_read(root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (root / "shapes").rglob("*")}
    assert ensure_shapes(root, **SMALL) == shapes_paths(root)
    assert before == {path: path.stat().st_mtime_ns for path in (root / "shapes").rglob("*")}
    assert shapes_paths(root)["val"] == ShapesSplit(
        str(root / "shapes/annotations/instances_val.json"), str(root / "shapes/val")
    )


def test_other_parameters_are_refused_and_both_are_named(root: Path) -> None:
    with pytest.raises(UserError, match=f"(?s)'size': {SIZE}.*'size': 96"):
        ensure_shapes(root, **{**SMALL, "size": 96})


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"no shapes\.json"):
        ensure_shapes(tmp_path, **SMALL)
    assert contents(tmp_path / "shapes") == {"notes.txt": b"mine"}


def test_files_in_the_way_are_named_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "shapes").write_text("mine")
    with pytest.raises(UserError, match=r"/shapes is in the way .* it is no folder; move it away"):
        ensure_shapes(tmp_path, **SMALL)
    with pytest.raises(UserError, match=r"in .*/shapes: .*; choose another DETECTRON2_DATASETS"):
        ensure_shapes(tmp_path / "shapes", **SMALL)
    assert contents(tmp_path) == {"shapes": b"mine"}


def test_a_damaged_data_set_is_named(tmp_path: Path) -> None:
    tiny = {"num_train": 2, "num_val": 1, "size": 64}
    ensure_shapes(tmp_path, **tiny)
    (tmp_path / "shapes/train/000002.jpg").unlink()
    with pytest.raises(UserError, match="1 of 2 images in train/"):
        ensure_shapes(tmp_path, **tiny)
    (tmp_path / "shapes/shapes.json").write_text("{")
    with pytest.raises(UserError, match=r"shapes\.json is not valid JSON"):
        ensure_shapes(tmp_path, **tiny)


def test_bad_parameters_leave_nothing_behind(tmp_path: Path) -> None:
    for bad in ({"size": 20}, {"num_train": 0}, {"seed": -1}):
        with pytest.raises(ValueError, match="at least 64|need num_images"):
            ensure_shapes(tmp_path, **{**SMALL, **bad})
    assert [path.name for path in tmp_path.iterdir() if path.name != "shapes.lock"] == []
    with pytest.raises(ValueError, match="split must be one of"):
        generate(tmp_path / "x", "test", num_images=1)


def start(root: Path, num_train: int) -> subprocess.Popen:
    code = (
        "from lsnet_d2.data.shapes import ensure_shapes\n"
        f"ensure_shapes({str(root)!r}, num_train={num_train}, num_val=1, size=64)"
    )
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT_OF_PROJECT)


def test_killed_half_way_and_asked_for_by_several_processes(tmp_path: Path) -> None:
    process = start(tmp_path, 100_000)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".shapes-*.tmp/train/*.jpg")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "shapes").exists()

    processes = [start(tmp_path, 8) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shapes", "shapes.lock"]
    ensure_shapes(tmp_path, num_train=8, num_val=1, size=64)


# --- through Detectron2


@pytest.fixture
def registered(root: Path) -> str:
    builtin.register_shapes(root, prefix="tiny_shapes", **SMALL)
    yield "tiny_shapes_train"
    for split in ("train", "val"):
        DatasetCatalog.remove(f"tiny_shapes_{split}")
        MetadataCatalog.remove(f"tiny_shapes_{split}")


def test_registration_is_lazy_and_may_be_repeated(tmp_path: Path) -> None:
    importlib.reload(builtin)
    builtin.register_shapes(tmp_path, prefix="shapes")
    assert {"shapes_train", "shapes_val"} <= set(DatasetCatalog.list())
    assert list(tmp_path.iterdir()) == []
    metadata = MetadataCatalog.get("shapes_train")
    assert not metadata.json_file.startswith(str(tmp_path))
    assert metadata.json_file.endswith(
        os.path.join("shapes", "annotations", "instances_train.json")
    )


def test_loaded_by_detectron2(registered: str, coco: COCO) -> None:
    records = DatasetCatalog.get(registered)
    metadata = MetadataCatalog.get(registered)
    assert len(records) == NUM_TRAIN
    assert metadata.thing_classes == list(CLASS_NAMES)
    assert len(metadata.keypoint_oks_sigmas) == len(metadata.keypoint_names) == 13
    assert sum(len(record["annotations"]) for record in records) == len(coco.anns)
    for record in records:
        for loaded, written in zip(
            record["annotations"], coco.imgToAnns[record["image_id"]], strict=True
        ):
            assert loaded["category_id"] == written["category_id"] - 1
            np.testing.assert_allclose(
                np.reshape(loaded["keypoints"], (-1, 3))[:, :2],
                np.reshape(written["keypoints"], (-1, 3))[:, :2] + 0.5,
            )


def test_mapped_by_detectron2_with_flipped_keypoints(registered: str) -> None:
    records = DatasetCatalog.get(registered)
    common = {
        "is_train": True,
        "image_format": "BGR",
        "use_instance_mask": True,
        "use_keypoint": True,
        "instance_mask_format": "bitmask",
        "keypoint_hflip_indices": create_keypoint_hflip_indices([registered]),
    }
    plain = DatasetMapper(augmentations=[], **common)
    mirror = DatasetMapper(augmentations=[T.RandomFlip(prob=1.0)], **common)
    joint = {name: index for index, name in enumerate(KEYPOINT_NAMES)}
    figures = 0
    for record in records:
        before, after = plain(record)["instances"], mirror(record)["instances"]
        if len(before) == 0:
            continue
        assert before.gt_keypoints.tensor.shape == (len(before), 13, 3)
        for one, other in zip(before.gt_keypoints.tensor, after.gt_keypoints.tensor, strict=True):
            for left, right in KEYPOINT_FLIP_MAP:
                a, b = one[joint[left]], other[joint[right]]
                assert a[2] == b[2]
                if a[2] > 0:
                    assert b[0] == pytest.approx(SIZE - a[0].item(), abs=1e-4)
                    assert b[1] == pytest.approx(a[1].item(), abs=1e-4)
            figures += bool(one[:, 2].any())
    assert figures >= 3


def test_smallest_extents_are_stated_for_all_classes() -> None:
    assert set(MIN_EXTENTS) == set(CLASS_NAMES)
    assert min(MIN_EXTENTS.values()) >= 12

import importlib.util
import json
import sys

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_util
from tiny_coco import ROOT

from lsnet_d2.data.coco_json import load_lsnet_json
from lsnet_d2.data.images import read_image_size

spec = importlib.util.spec_from_file_location(
    "take_photos", ROOT / "projects/people/take_photos.py"
)
take_photos = importlib.util.module_from_spec(spec)
spec.loader.exec_module(take_photos)

SIZES = {1: (640, 426), 2: (300, 896), 3: (320, 240)}  # width, height
PERSON = {
    "category_id": 1,
    "bbox": [100, 50, 200, 100],
    "segmentation": [[100, 50, 300, 50, 300, 150]],
    "keypoints": [100, 50, 2, 300, 150, 1, 0, 0, 0],
    "num_keypoints": 2,
    "area": 10000.0,
    "iscrowd": 0,
}


@pytest.fixture
def coco(tmp_path, monkeypatch):
    """Three photos in two of COCO's folders, a crowd on the second."""
    for source, numbers in (("train2017", (1, 2)), ("val2017", (3,))):
        folder = tmp_path / "coco" / source
        folder.mkdir(parents=True)
        images, annotations = [], []
        for number in numbers:
            width, height = SIZES[number]
            name = f"{number:012d}.jpg"
            Image.fromarray(np.full((height, width, 3), 20 * number, np.uint8)).save(folder / name)
            images.append({"id": number, "file_name": name, "width": width, "height": height})
            annotations.append({**PERSON, "id": 10 + number, "image_id": number})
        if 2 in numbers:
            width, height = SIZES[2]
            mask = np.zeros((height, width), np.uint8)
            mask[: height // 2] = 1
            rle = mask_util.encode(np.asfortranarray(mask))
            crowd = {"size": rle["size"], "counts": rle["counts"].decode()}
            annotations[-1] |= {"iscrowd": 1, "segmentation": crowd}
        category = {"id": 1, "name": "person", "keypoints": ["head", "hand", "foot"]}
        content = {"images": images, "annotations": annotations, "categories": [category]}
        path = tmp_path / "coco" / "annotations" / f"person_keypoints_{source}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    photos = {"train": {"train2017": [2], "val2017": [3]}, "val": {"train2017": [1]}}
    (tmp_path / "photos.json").write_text(json.dumps(photos))
    monkeypatch.setattr(take_photos, "PHOTOS", tmp_path / "photos.json")
    return tmp_path


def run(folder, monkeypatch):
    arguments = [str(folder / "coco"), "--output", str(folder / "people")]
    monkeypatch.setattr(sys, "argv", ["take_photos.py", *arguments])
    take_photos.main()
    return {
        split: json.loads(
            (folder / f"people/annotations/person_keypoints_{split}.json").read_text()
        )
        for split in ("train", "val")
    }


def test_photos_and_annotations_shrink_together(coco, monkeypatch):
    found = run(coco, monkeypatch)
    assert [image["id"] for image in found["train"]["images"]] == [2, 3]
    sizes = {
        image["id"]: (image["width"], image["height"])
        for content in found.values()
        for image in content["images"]
    }
    assert sizes == {1: (448, 298), 2: (150, 448), 3: (320, 240)}
    for number, size in sizes.items():
        assert read_image_size(f"{coco}/people/images/{number:012d}.jpg") == size[::-1]
    (person,) = found["val"]["annotations"]
    x, y = 448 / 640, 298 / 426
    assert person["bbox"] == pytest.approx([100 * x, 50 * y, 200 * x, 100 * y], abs=0.005)
    assert person["segmentation"][0] == pytest.approx(
        [100 * x, 50 * y, 300 * x, 50 * y, 300 * x, 150 * y], abs=0.005
    )
    # the middles of their pixels
    first, second = [100.5 * x - 0.5, 50.5 * y - 0.5, 2], [300.5 * x - 0.5, 150.5 * y - 0.5, 1]
    assert person["keypoints"] == pytest.approx([*first, *second, 0, 0, 0])
    assert person["area"] == pytest.approx(10000 * x * y)
    crowd, unchanged = found["train"]["annotations"]
    mask = mask_util.decode(crowd["segmentation"])
    assert mask.shape == (448, 150) and mask[:224].all() and not mask[224:].any()
    assert unchanged == {**PERSON, "id": 13, "image_id": 3}
    for split in ("train", "val"):  # and can be loaded
        path = coco / f"people/annotations/person_keypoints_{split}.json"
        records = load_lsnet_json(path, coco / "people/images", f"taken {coco.name} {split}")
        assert len(records) == len(found[split]["images"])


def test_what_is_missing_is_named(coco, monkeypatch, capsys):
    (coco / "coco/val2017/000000000003.jpg").unlink()
    with pytest.raises(SystemExit):
        run(coco, monkeypatch)
    assert "000000000003.jpg: no such photo" in capsys.readouterr().err
    assert not list((coco / "people/annotations").iterdir())
    (coco / "photos.json").write_text(json.dumps({"train": {"val2017": [3, 9]}, "val": {}}))
    with pytest.raises(SystemExit):
        run(coco, monkeypatch)
    assert "val2017: 1 photos are not in COCO's file: [9]" in capsys.readouterr().err


def test_the_list_is_of_different_photos():
    splits = json.loads((ROOT / "projects/people/photos.json").read_text())
    ids = {
        split: [number for found in sources.values() for number in found]
        for split, sources in splits.items()
    }
    assert {split: len(numbers) for split, numbers in ids.items()} == {"train": 812, "val": 163}
    assert len({*ids["train"], *ids["val"]}) == 975

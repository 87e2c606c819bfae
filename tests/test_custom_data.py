"""docs/custom_data.md, followed from top to bottom."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from own_data import CATEGORIES, write_own_data
from PIL import Image
from pycocotools.coco import COCO
from tiny_coco import ROOT, tool_environment

# What makes a training a matter of seconds that needs no weights, and its model find something.
QUICKLY = (
    "MODEL.WEIGHTS '' SOLVER.MAX_ITER 2 DATALOADER.NUM_WORKERS 0 "
    "SOLVER.IMS_PER_BATCH 2 SOLVER.REFERENCE_IMS_PER_BATCH 0 "
    "MODEL.LSNET.PRIOR_PROB 0.9 INPUT.MIN_SIZE_TRAIN '(96,)' INPUT.MIN_SIZE_TEST 96 "
    "MODEL.LSNET.KEYPOINT_CLASSES '[]' MODEL.DEVICE cpu SEED 1"
)


def blocks(page):
    """Language and text of each block of the page."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def run(folder, language, text):
    env = tool_environment()
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    command = {"bash": ["bash", "-euc"], "python": [sys.executable, "-c"]}[language]
    result = subprocess.run(
        [*command, text], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, f"{text}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.mark.slow
def test_the_page_works_from_top_to_bottom(tmp_path):
    path, _ = write_own_data(tmp_path / "birds", "train", 4)
    write_own_data(tmp_path / "birds", "val", 2)
    data = json.loads(path.read_text())
    data["annotations"][0]["bbox"][3] = 0  # something to repair
    path.write_text(json.dumps(data))
    for folder in ("tools", "projects"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    outputs = []
    for language, text in blocks(ROOT / "docs" / "custom_data.md"):
        if language == "json":
            assert json.loads(text) == CATEGORIES[1]
            continue
        # put before the page's own keys, so that those win
        text = re.sub(
            r"^(python tools/train_net.py(?: --\S+| \S+\.yaml)+)(.*)$",
            rf"\1 {QUICKLY}\2",
            text,
            flags=re.MULTILINE,
        )
        text = text.replace('"birds.yaml", *', f'"birds.yaml", *{shlex.split(QUICKLY)}, *')
        outputs.append(run(tmp_path, language, text))
    assert "annotation 1 of image 000.jpg: its box" in outputs[0]

    for name in ("birds", "finer", "mine"):
        assert (tmp_path / "output" / name / "model_final.pth").is_file()

    birds, pictures = tmp_path / "birds", tmp_path / "pictures"
    metrics = (tmp_path / "output" / "birds" / "metrics.json").read_text()
    for loss in ("loss_bbox_refine", "loss_segm_refine", "loss_pose_refine", "keypoints/AP"):
        assert loss in metrics
    counts = {folder.name: len(list(folder.iterdir())) for folder in pictures.iterdir()}
    assert counts == {"annotated": 4, "augmented": 4, "results": 2, "found": 2}
    with Image.open(birds / "train.png") as picture:
        assert picture.format == "PNG"

    with Image.open(birds / "000_found.png") as picture:
        assert picture.size == (640, 480)
    labelme = json.loads((birds / "val" / "000.json").read_text())
    assert {shape["shape_type"] for shape in labelme["shapes"]} == {"polygon", "point"}
    assert labelme["imagePath"] == "000.jpg"
    labels = {shape["label"] for shape in labelme["shapes"]}
    assert labels <= {"ball", "bird", "box", *CATEGORIES[1]["keypoints"]}
    geojson = json.loads((birds / "000.geojson").read_text())
    parts = {feature["properties"]["part"] for feature in geojson["features"]}
    assert parts == {"box", "contour", "keypoints"}
    true = COCO(birds / "val.json")
    found = true.loadRes(str(birds / "coco_results.json"))
    assert {a["category_id"] for a in found.anns.values()} <= {10, 20, 40}
    assert len(found.anns) == len(
        {feature["properties"]["object"] for feature in geojson["features"]}
    )
    assert_same_without_pytorch(birds)


def assert_same_without_pytorch(birds):
    """The exported model finds what the model found, and knows what it is called."""
    with Image.open(birds / "000_onnx.png") as picture:
        assert picture.size == (128, 96)
    ids = {category["name"]: category["id"] for category in CATEGORIES}
    expected = json.loads((birds / "coco_results.json").read_text())
    found = json.loads((birds / "000_onnx.json").read_text())
    assert len(found) >= len(expected) > 0
    for ours, theirs in zip(found, expected, strict=False):
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-3)
    best = found[0]
    same = [x for x in expected if abs(x["score"] - best["score"]) < 1e-3]
    x, y, right, bottom = best["box"]
    assert any(
        ids[best["class"]] == other["category_id"]
        and other["bbox"] == pytest.approx([x, y, right - x, bottom - y], abs=0.1)
        for other in same
    )
    assert len(best["contours"]) == 36 and len(best["keypoints"]) == 5
    assert best["skeleton"] == [[a - 1, b - 1] for a, b in CATEGORIES[1]["skeleton"]]

import json

import numpy as np
import pytest
from pycocotools import mask as mask_util
from tiny_coco import run_tool, run_tool_here

HEIGHT, WIDTH = 120, 200


def run_here(monkeypatch, *arguments):
    return run_tool_here(monkeypatch, "contour_ceiling.py", *arguments)


def rectangle(x, y, width, height):
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def uncompressed(mask):
    """COCO's run lengths, in columns, of which the first is of zeros."""
    values = np.asarray(mask).T.reshape(-1).astype(int)
    changes = np.flatnonzero(np.diff(values)) + 1
    counts = np.diff(np.concatenate([[0], changes, [values.size]])).tolist()
    return {"size": [HEIGHT, WIDTH], "counts": counts if values[0] == 0 else [0, *counts]}


@pytest.fixture
def coco(tmp_path):
    disk = np.hypot(*(np.indices((HEIGHT, WIDTH)) - np.array([60, 100])[:, None, None])) < 40
    crowd = np.zeros((HEIGHT, WIDTH), np.uint8)
    crowd[90:, :50] = 1
    packed = mask_util.encode(np.asfortranarray(disk.astype(np.uint8)))
    packed["counts"] = packed["counts"].decode()
    segmentations = [
        [rectangle(10, 10, 60, 40)],
        [rectangle(100, 10, 40, 40), rectangle(150, 10, 40, 40)],
        packed,
        uncompressed(disk),
    ]
    annotations = [
        {
            "id": number,  # COCO's ids start with 1, but 0 is no error
            "image_id": 1 + number // 2,
            "category_id": 1,
            "bbox": [10, 10, 60, 40],
            "segmentation": segmentation,
        }
        for number, segmentation in enumerate(segmentations)
    ]
    annotations += [
        {**annotations[0], "id": 4, "segmentation": uncompressed(crowd), "iscrowd": 1},
        {**annotations[0], "id": 5, "segmentation": []},
    ]
    data = {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in (1, 2)
        ],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "fig"}],
    }
    path = tmp_path / "in.json"
    path.write_text(json.dumps(data))
    return path


def rows(text):
    """Lines of the printed table: (method, points) -> numbers by column."""
    header = ["AP", "AP50", "AP75", "APs", "APm", "APl", "one", "several", "boxes", "ms"]
    lines = [line.split() for line in text.splitlines()]
    lines = [line for line in lines if line and line[0] in ("adaptive", "reference")]
    return {
        (line[0], int(line[1])): dict(zip(header, map(float, line[2:]), strict=True))
        for line in lines
    }


def test_scores_polygons_and_masks(coco):
    result = run_tool("contour_ceiling.py", coco, "--num-points", 12, 36)
    assert result.returncode == 0, result.stderr
    assert "4 objects, 1 of them in several parts" in result.stdout
    table = rows(result.stdout)
    assert set(table) == {(m, p) for m in ("adaptive", "reference") for p in (12, 36)}
    best, reference = table["adaptive", 36], table["reference", 36]
    assert best["AP"] == pytest.approx(1, abs=0.005)
    assert best["several"] > 0.97 and best["one"] > 0.98 and best["boxes"] == 1
    # the released code finds one of the two parts, which are of equal size
    assert reference["several"] == pytest.approx(0.5, abs=0.03)
    assert reference["AP75"] < 0.8
    assert np.isnan(best["APs"])
    assert all(row["ms"] > 0 for row in table.values())
    assert table["adaptive", 12]["one"] < best["one"]


def test_options_choose_the_rows(coco, monkeypatch, capsys):
    assert run_here(monkeypatch, coco, "--method", "reference", "--num-points", 8) == 0
    assert set(rows(capsys.readouterr().out)) == {("reference", 8)}


def test_more_objects_than_coco_counts_in_an_image(coco, monkeypatch, capsys):
    data = json.loads(coco.read_text())
    data["annotations"] = [
        {
            **data["annotations"][0],
            "id": 1 + number,
            "segmentation": [rectangle(12 * (number % 15), 12 * (number // 15), 10, 10)],
        }
        for number in range(130)
    ]
    coco.write_text(json.dumps(data))
    assert run_here(monkeypatch, coco, "--method", "adaptive", "--num-points", 16) == 0
    row = rows(capsys.readouterr().out)["adaptive", 16]
    assert row["AP"] == row["APs"] == 1


def test_bad_input(coco, tmp_path, monkeypatch, capsys):
    assert run_here(monkeypatch, coco, "--num-points", 36, 7) == 2
    assert "--num-points 7 is not 8 to 128" in capsys.readouterr().err
    assert run_here(monkeypatch, tmp_path / "gone.json") == 2
    assert "gone.json: no such annotation file" in capsys.readouterr().err

    data = json.loads(coco.read_text())
    data["annotations"] = data["annotations"][-1:]
    coco.write_text(json.dumps(data))
    assert run_here(monkeypatch, coco) == 2
    assert "in.json: no object with a usable segmentation" in capsys.readouterr().err

    data["annotations"][0]["segmentation"] = {"size": [5, 5], "counts": [25]}
    coco.write_text(json.dumps(data))
    assert run_here(monkeypatch, coco) == 2
    assert "annotation 5: an RLE of" in capsys.readouterr().err

    data["annotations"][0].update(segmentation=[], image_id=9)
    coco.write_text(json.dumps(data))
    assert run_here(monkeypatch, coco) == 2
    assert "annotation 5: image 9 is not in the file" in capsys.readouterr().err

    data["annotations"][0].update(segmentation=[[1, 1, 9, 1, 9, 9]], image_id=1, bbox=None)
    coco.write_text(json.dumps(data))
    assert run_here(monkeypatch, coco) == 2
    assert "annotation 5: its box None is not four finite numbers" in capsys.readouterr().err

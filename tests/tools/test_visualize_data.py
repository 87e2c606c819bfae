import json

import numpy as np
import pytest
import tiny_coco
from PIL import Image
from tiny_coco import run_tool

FILES = ["0000_000000000001.png", "0001_000000000002.png"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("visualize")
    tiny_coco.write_config(folder)
    return tiny_coco.write_coco(folder)


def visualize(data, output, *args):
    return run_tool(
        "visualize_data.py",
        *["--config-file", data / "tiny.yaml", "--output-dir", output, *args],
        datasets=data,
    )


def read(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("source", ["annotation", "dataloader"])
def test_ground_truth(data, source):
    output = data / source
    result = visualize(data, output, "--source", source, "--num", 2)
    assert result.returncode == 0, result.stderr
    assert sorted(p.name for p in output.iterdir()) == FILES
    assert read(output / FILES[0]).shape == (480, 640, 3)


def test_predictions_beside_ground_truth(data):
    results = [
        {"image_id": 1, "category_id": 1, "bbox": [12, 10, 24, 20], "score": 0.9},
        {"image_id": 2, "category_id": 3, "bbox": [16, 10, 24, 20], "score": 0.2},
    ]
    path = data / "results.json"
    path.write_text(json.dumps(results))
    result = visualize(data, data / "beside", "--predictions", path)
    assert result.returncode == 0, result.stderr
    first, second = (read(data / "beside" / name) for name in FILES)
    assert first.shape == (480, 640 + 6 + 640, 3)
    # drawn: the left half of both, and the right half of the first only
    blank = read(data / "coco" / "val2017" / "000000000002.png")
    blank = blank.repeat(10, axis=0).repeat(10, axis=1)
    assert (second[:, 646:] == blank).all()
    assert (second[:, :640] != blank).any()
    blank = read(data / "coco" / "val2017" / "000000000001.png")
    assert (first[:, 646:] != blank.repeat(10, axis=0).repeat(10, axis=1)).any()


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "results.json"),
        ("{}", "not a list of COCO results"),
        ('[{"image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 2]}]', "number 0 has no 'score'"),
        (
            '[{"image_id": 1, "category_id": 12, "bbox": [1, 1, 2, 2], "score": 1}]',
            "category 12 of image 1 is not in the data set",
        ),
    ],
)
def test_unusable_predictions(data, tmp_path, content, message):
    path = tmp_path / "results.json"
    path.write_text(content)
    result = visualize(data, tmp_path, "--predictions", path)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert message in result.stderr.splitlines()[-1]


def test_unknown_data_set(data, tmp_path):
    result = visualize(data, tmp_path, "--dataset", "coco_2017_trian")
    assert result.returncode == 2
    assert "coco_2017_trian" in result.stderr and "coco_2017_train" in result.stderr

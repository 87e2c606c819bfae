import importlib.util
import json

import numpy as np
import pytest
import tiny_coco
import torch
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Boxes, Instances
from PIL import Image
from tiny_coco import ROOT, run_tool

from lsnet_d2.errors import UserError

FILES = ["0000_000000000001.png", "0001_000000000002.png"]

spec = importlib.util.spec_from_file_location("visualize_data", ROOT / "tools/visualize_data.py")
visualize_data = importlib.util.module_from_spec(spec)
spec.loader.exec_module(visualize_data)


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


def test_images_of_ones_choice(data, tmp_path):
    result = visualize(data, tmp_path, "--image-ids", 3, 1)
    assert result.returncode == 0, result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "0000_000000000003.png",
        "0001_000000000001.png",
    ]
    result = visualize(data, tmp_path, "--image-ids", 77)
    assert result.returncode == 2
    assert "--image-ids: data set coco_2017_train has no image 77" in result.stderr


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


def make_predictions():
    """Two objects with all that a model may predict."""
    predictions = Instances((48, 64))
    predictions.pred_boxes = Boxes(torch.tensor([[12.0, 10, 36, 30], [40, 8, 60, 44]]))
    predictions.scores = torch.tensor([0.9, 0.8])
    predictions.pred_classes = torch.tensor([0, 2])
    masks = torch.zeros(2, 48, 64, dtype=torch.bool)
    masks[0, 10:30, 12:36] = True
    masks[1, 8:44, 40:60] = True
    predictions.pred_masks = masks
    predictions.pred_keypoints = torch.tensor(
        [[[20.25, 15, 0.9], [30, 25.75, 0.01]], [[45, 10, 0.3], [50, 40, 0.6]]]
    )
    return predictions


def write_results(path, predictions, *, contour=False):
    """What Detectron2 writes, with our landmarks beside it."""
    results = instances_to_coco_json(predictions, 1)
    for result in results:
        x, y, w, h = result["bbox"]
        result["extreme_points"] = [[x + 3, y], [x, y + 4], [x + 5, y + h], [x + w, y + 6]]
        if contour:
            corners = [[x, y], [x, y + h], [x + w, y + h], [x + w, y]]
            result["contour"] = [[x + w / 2, y], *corners]
    path.write_text(json.dumps(results))
    return results


@pytest.mark.parametrize("contour", [False, True])
def test_results_become_the_predictions_that_they_were(tmp_path, contour):
    expected = make_predictions()
    keypoints = expected.pred_keypoints.clone()
    results = write_results(tmp_path / "results.json", expected, contour=contour)
    assert results[0]["keypoints"][0] == 19.75  # an index of a pixel
    loaded = visualize_data.load_predictions(str(tmp_path / "results.json"), 0.85)
    assert {image: len(found) for image, found in loaded.items()} == {1: 1}
    loaded = visualize_data.load_predictions(str(tmp_path / "results.json"), 0.5)
    instances = visualize_data.to_instances(loaded[1], (48, 64), {0: 0, 2: 2})
    assert torch.equal(instances.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(instances.pred_classes, expected.pred_classes)
    assert torch.allclose(instances.scores, expected.scores)
    assert torch.allclose(instances.pred_keypoints, keypoints)
    assert instances.pred_extreme_points[0].tolist() == [[15, 10], [12, 14], [17, 30], [36, 16]]
    assert instances.has("pred_contours") == contour
    assert instances.has("pred_masks") != contour
    if contour:
        assert instances.pred_contours.shape == (2, 5, 2)
        assert instances.pred_contours[1, 0].tolist() == [50, 8]
    else:
        assert torch.equal(instances.pred_masks, expected.pred_masks)


def test_images_without_results():
    instances = visualize_data.to_instances([], (48, 64), {})
    assert len(instances) == 0 and set(instances.get_fields()) == {
        "pred_boxes",
        "scores",
        "pred_classes",
    }


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("contour", None, "number 1 has no 'contour'"),
        ("keypoints", [1, 2, 1] * 3, "number 1: malformed 'keypoints'"),
        ("keypoints", "none", "number 1: malformed 'keypoints'"),
        ("extreme_points", [[1, 2], [3, 4]], "number 1: malformed 'extreme_points'"),
        ("contour", [], "number 1: malformed 'contour'"),
        ("contour", [[1, float("nan")]] * 5, "number 1: malformed 'contour'"),
    ],
)
def test_malformed_landmarks(tmp_path, key, value, message):
    path = tmp_path / "results.json"
    results = write_results(path, make_predictions(), contour=True)
    results[1][key] = value
    if value is None:
        del results[1][key]
    path.write_text(json.dumps(results))
    with pytest.raises(UserError, match=message):
        visualize_data.load_predictions(str(path), 0.5)


@pytest.mark.parametrize(
    "segmentation, message",
    [
        ([[1, 2, 3, 4, 5, 6]], "image 1: its 'segmentation' is not an RLE"),
        ({"size": [48, 32], "counts": "a"}, r"image 1: .*\[48, 32\]"),
    ],
)
def test_unusable_masks(tmp_path, segmentation, message):
    results = write_results(tmp_path / "results.json", make_predictions())
    results[0]["segmentation"] = segmentation
    with pytest.raises(UserError, match=message):
        visualize_data.to_instances(results, (48, 64), {0: 0, 2: 2})


@pytest.mark.parametrize("style", ["filled", "outlined"])
def test_contours_are_filled_or_outlined(data, tmp_path, style):
    results = write_results(tmp_path / "results.json", make_predictions(), contour=True)
    for result in results:
        result["category_id"] += 1
    (tmp_path / "results.json").write_text(json.dumps(results))
    # fmt: off
    result = visualize(
        data, tmp_path / style, "--predictions", tmp_path / "results.json", "--num", 1,
        "--contours", style, "--keypoint-threshold", 0.5,
    )
    # fmt: on
    assert result.returncode == 0, result.stderr
    picture = read(tmp_path / style / FILES[0])[:, 646:].astype(int)
    scene = read(data / "coco" / "val2017" / "000000000001.png").astype(int)

    def is_drawn(x, y):
        return bool(np.abs(picture[round(10 * y), round(10 * x)] - scene[int(y), int(x)]).max() > 9)

    assert is_drawn(12, 28) and is_drawn(60, 40)  # contours
    # above the background, and clear of boxes, labels and landmarks
    assert is_drawn(56.5, 35.5) == (style == "filled")
    # scores of 0.9, 0.6 and 0.3
    assert is_drawn(20.25, 15) and is_drawn(50, 40)
    assert style == "filled" or not is_drawn(45, 10.3)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "results.json"),
        ("{}", "not a list of COCO results"),
        ("[1, 2]", "not a list of COCO results"),
        (
            '[{"image_id": 1, "category_id": 1, "bbox": [1, 1], "score": 1}]',
            "number 0: its box [1, 1] is not four finite numbers",
        ),
        (
            '[{"image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 2], "score": "1"}]',
            "number 0: its score '1' is not a number",
        ),
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


def test_what_gen_coco_lsvr_writes_is_drawn(data, tmp_path):
    tiny_coco.write_coco(tmp_path)
    for split in tiny_coco.SPLITS:
        target = tiny_coco.json_file(tmp_path, split)
        written = run_tool(
            "gen_coco_lsvr.py", tiny_coco.json_file(data, split), target, "--overwrite"
        )
        assert written.returncode == 0, written.stderr
    # detectron2's loader of "coco_2017_train" would drop the points
    (tmp_path / "coco" / "train2017").rename(tmp_path / "coco" / "train")
    target.with_name("instances_train2017.json").rename(target.with_name("instances_train.json"))
    result = run_tool(
        "visualize_data.py",
        *["--config-file", data / "tiny.yaml", "--output-dir", tmp_path / "pictures"],
        *["--dataset", "coco_train", "--num", 1],
        datasets=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    picture = read(tmp_path / "pictures" / FILES[0]).astype(int)
    # the dot of the left extreme point has a white edge, between dark grey and red
    dot = picture[196:205, 100:140].reshape(-1, 3)
    assert (dot.min(axis=1) > 120).any()


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_an_image_that_cannot_be_read(tmp_path, damage):
    tiny_coco.write_config(tmp_path)
    tiny_coco.write_coco(tmp_path)
    image = tmp_path / "coco" / "train2017" / "000000000001.png"
    content = image.read_bytes()
    image.unlink()
    if damage == "truncated":
        image.write_bytes(content[: len(content) // 2])
    result = visualize(tmp_path, tmp_path / "pictures")
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "000000000001.png: n" in last and "image file" in last


def test_output_folder_that_is_a_file(data, tmp_path):
    (tmp_path / "pictures").touch()
    result = visualize(data, tmp_path / "pictures")
    assert result.returncode == 2
    assert f"error: {tmp_path}/pictures: cannot make this folder: File exists" in result.stderr

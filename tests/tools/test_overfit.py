import importlib.util
import json

import pytest
import tiny_coco
from tiny_coco import ROOT, run_tool

from lsnet_d2.config_file import load_config


@pytest.fixture
def data(tmp_path):
    return tiny_coco.write_coco(tmp_path)


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("overfit", ROOT / "tools" / "overfit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_takes_the_first_images_with_objects(tool):
    def annotation(image, **more):
        return {"image_id": image, **more}

    data = {
        "images": [{"id": number} for number in (1, 2, 3, 4)],
        "annotations": [
            annotation(1, ignore=1),
            annotation(2, iscrowd=1),
            annotation(3, keypoints=[1, 1, 0]),
            annotation(3, keypoints=None),
            annotation(3, iscrowd=1),
            annotation(4, keypoints=[1, 1, 2]),
        ],
        "categories": [{"id": 1}],
    }
    taken = tool.first_images(data, 5)
    assert [image["id"] for image in taken["images"]] == [3, 4]
    assert len(taken["annotations"]) == 4
    assert [i["id"] for i in tool.first_images(data, 1)["images"]] == [3]
    assert [i["id"] for i in tool.first_images(data, 5, keypoints=True)["images"]] == [4]


def test_the_schedule_is_for_few_images(tool):
    """Not that of the config, which may be for thousands."""
    path = str(ROOT / "configs/bbox/lsnet_R_50_FPN_1x.yaml")
    best = ["TEST.BEST_METRIC", "bbox/AP"]
    schedule = tool.as_opts(tool.short_schedule(load_config(path, best, need_data_sets=False)))
    given = ["SOLVER.WARMUP_ITERS", "500"]
    short = load_config(path, [*best, *schedule, *given], need_data_sets=False)
    assert (short.SOLVER.MAX_ITER, short.SOLVER.STEPS) == (1150, (767, 1054))
    assert (short.SOLVER.WARMUP_ITERS, short.TEST.EVAL_PERIOD) == (500, 0)
    assert short.TEST.BEST_METRIC == ""


def test_images_are_shown_as_in_tests(tool):
    path = str(ROOT / "configs/plus/photos_joint.yaml")
    cfg = load_config(path, need_data_sets=False)
    assert cfg.INPUT.CROP.ENABLED and len(cfg.INPUT.MIN_SIZE_TRAIN) > 1
    same = load_config(path, tool.as_opts(tool.as_in_tests(cfg)), need_data_sets=False).INPUT
    assert (same.RANDOM_FLIP, same.CROP.ENABLED) == ("none", False)
    assert (same.MIN_SIZE_TRAIN, same.MAX_SIZE_TRAIN) == ((384,), 544)
    assert (same.MIN_SIZE_TEST, same.MAX_SIZE_TEST) == (384, 544)


def test_trains_and_evaluates_on_the_same_images(data):
    output = data / "output"
    result = run_tool(
        "overfit.py",
        tiny_coco.json_file(data, "train"),
        data / "coco" / "train2017",
        *("--config-file", tiny_coco.write_config(data), "--num-images", 2, "--output", output),
        *("--opts", "SOLVER.MAX_ITER", 1, "DATASETS.COCO_FILES", [["mine", "a.json", "images"]]),
    )
    assert result.returncode == 0, result.stderr
    assert "AP,AP50,AP75" in result.stdout
    subset = json.loads((output / "annotations.json").read_text())
    assert [image["id"] for image in subset["images"]] == [1, 2]
    # Of a config that this has written, the data of then are not those of now.
    again = run_tool(
        "overfit.py",
        tiny_coco.json_file(data, "val"),
        data / "coco" / "val2017",
        *("--config-file", output / "config.yaml", "--output", data / "other"),
        *("--opts", "SOLVER.MAX_ITER", 1),
    )
    assert again.returncode == 0, again.stderr
    saved = load_config(str(data / "other" / "config.yaml"), ["MODEL.DEVICE", "cpu"])
    files = {name: (file, images) for name, file, images in saved.DATASETS.COCO_FILES}
    assert files["overfit"] == (
        str(data / "other" / "annotations.json"),
        str(data / "coco" / "val2017"),
    )
    assert files["mine"] == ("a.json", "images") and len(saved.DATASETS.COCO_FILES) == 2
    # The checkpoint that is left serves other tools.
    result = run_tool(
        "train_net.py",
        *("--config-file", output / "model_final.pth", "--eval-only"),
        *("OUTPUT_DIR", data / "again"),
    )
    assert result.returncode == 0, result.stderr
    assert "AP,AP50,AP75" in result.stdout


def test_keypoints_are_those_of_the_file(data):
    """Their names are known only when the file has been read, which the mapper needs."""
    path = tiny_coco.json_file(data, "train")
    dataset = json.loads(path.read_text())
    names = ["left_tip", "right_tip", "stem"]
    dataset["categories"] = [{**dataset["categories"][0], "keypoints": names, "skeleton": []}]
    for annotation in dataset["annotations"]:
        annotation.update(category_id=1, keypoints=[20, 15, 2, 25, 20, 2, 22, 25, 1])
    path.write_text(json.dumps(dataset))
    sigmas = ("TEST.KEYPOINT_OKS_SIGMAS", "[0.1, 0.1, 0.1]")
    result = run_tool(
        "overfit.py",
        *(path, data / "coco" / "train2017", "--keypoints", "--num-images", 2),
        *("--config-file", tiny_coco.write_config(data, "LSNet"), "--output", data / "output"),
        *("--opts", "SOLVER.MAX_ITER", 1, "MODEL.LSNET.TASK", "pose_bbox"),
        *("MODEL.LSNET.NUM_KEYPOINTS", 3, *sigmas),
    )
    assert result.returncode == 0, result.stderr
    assert "loss_pose_refine" in (data / "output" / "metrics.json").read_text()


def test_nothing_to_learn_is_said(data):
    empty = data / "empty.json"
    empty.write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    result = run_tool("overfit.py", empty, data, "--config-file", tiny_coco.write_config(data))
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"{empty}: no image with objects" in result.stderr

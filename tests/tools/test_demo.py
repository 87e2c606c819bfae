import importlib.util
import logging

import cv2
import numpy as np
import pytest
import tiny_coco
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image
from tiny_coco import ROOT, run_tool

from lsnet_d2 import Results
from lsnet_d2.checkpointer import LSNetCheckpointer
from lsnet_d2.config_file import load_config
from lsnet_d2.errors import UserError
from lsnet_d2.modeling import LSNetWithTTA
from lsnet_d2.visualizer import PALETTE

spec = importlib.util.spec_from_file_location("demo", ROOT / "tools/demo.py")
demo_tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo_tool)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Config, weights, two good images, two that cannot be used and a video."""
    folder = tmp_path_factory.mktemp("demo")
    config = tiny_coco.write_config(folder)
    model = build_model(load_config(str(config), ["MODEL.DEVICE", "cpu"]))
    for name, parameter in model.named_parameters():
        if name.endswith("conv3.norm.weight"):
            parameter.data.zero_()  # untrained residuals would grow beyond bounds
    LSNetCheckpointer(model, str(folder)).save("weights")
    images = folder / "images"
    images.mkdir()
    for name in ("a.jpg", "b.png"):
        Image.fromarray(np.full((48, 64, 3), 90, np.uint8)).save(images / name)
    (images / "broken.jpg").write_bytes((images / "a.jpg").read_bytes()[:300])
    (images / "notes.txt").write_text("no image")
    Image.new("RGB", (5000, 1)).save(images / "narrow.png")
    writer = cv2.VideoWriter(
        str(folder / "clip.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48)
    )
    for value in range(3):
        writer.write(np.full((48, 64, 3), 80 * value, np.uint8))
    writer.release()
    return folder


def demo(folder, *args, threshold=0.0, opts=()):
    return run_tool(
        "demo.py",
        # fmt: off
        "--config-file",
        folder / "tiny.yaml",
        *args,
        "--confidence-threshold",
        threshold,
        "--opts",
        "MODEL.WEIGHTS",
        folder / "weights.pth",
        *opts,
        # fmt: on
        datasets=folder,
    )


def test_folder_with_a_broken_image(folder):
    output = folder / "from_folder"
    result = demo(
        folder,
        *["--input", folder / "images", "--output", output],
        *["--contours", "outlined", "--keypoint-threshold", 0.3],
    )
    assert result.returncode == 1
    assert "broken.jpg: not a complete image file" in result.stdout
    assert "narrow.png: too narrow to be resized" in result.stdout
    assert "2 of 4 images could not be used" in result.stdout
    assert sorted(p.name for p in output.iterdir()) == ["a.jpg", "b.png"]
    with Image.open(output / "b.png") as picture:
        assert picture.size == (640, 480)
        assert len(picture.getcolors(1 << 20)) > 1  # a score of 0 is enough to be drawn


def make_detector(folder, threshold):
    opts = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", str(folder / "weights.pth")]
    return demo_tool.Detector(
        load_config(str(folder / "tiny.yaml"), opts), threshold, contours="outlined"
    )


def test_images_are_read_as_in_training(folder, tmp_path):
    Image.fromarray(np.full((48, 64), 128 * 257, np.uint16)).save(tmp_path / "deep.png")
    detector = make_detector(folder, 0.99)
    output = tmp_path / "out.png"
    assert demo_tool.run_on_images(detector, [str(tmp_path / "deep.png")], str(output)) == 0
    with Image.open(output) as picture:
        assert picture.getcolors() == [(640 * 480, (128, 128, 128))]


def test_pictures_are_named_as_images_are(tmp_path):
    """Links, as caches have them, lead to files whose names say nothing."""
    (tmp_path / "blob").write_bytes(b"")
    images = [tmp_path / "val" / name for name in ("a.jpg", "b.jpg")]
    images[0].parent.mkdir()
    for image in images:
        image.symlink_to(tmp_path / "blob")
    out = tmp_path / "out"
    planned = demo_tool.plan_outputs(images, str(out))
    assert planned == {image: out / image.name for image in images}
    same = [tmp_path / name for name in ("x.webp", "x.webp.png")]
    with pytest.raises(UserError, match="2 of the images would be written to .*x.webp.png"):
        demo_tool.plan_outputs(same, str(out))


def test_a_video_that_fails_leaves_nothing(folder, monkeypatch, tmp_path):
    detector = make_detector(folder, 0.99)
    draw, calls = detector.draw, []

    def fail_at_the_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise UserError("metadata of another skeleton")
        return draw(*args)

    monkeypatch.setattr(detector, "draw", fail_at_the_second)
    with pytest.raises(UserError, match="another skeleton"):
        demo_tool.run_on_video(detector, str(folder / "clip.avi"), str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_glob_threshold_and_output_file(folder):
    output = folder / "one.png"
    pattern = folder / "images" / "a*.jpg"
    result = demo(folder, "--input", pattern, "--output", output, threshold=0.99)
    assert result.returncode == 0, result.stderr
    assert "a.jpg: 0 objects" in result.stdout
    with Image.open(output) as picture:
        assert len(picture.getcolors(1 << 20)) == 1


def test_video(folder):
    output = folder / "videos"
    result = demo(folder, "--video-input", folder / "clip.avi", "--output", output)
    assert result.returncode == 0, result.stderr
    assert [p.name for p in output.iterdir()] == ["clip.mp4"]
    capture = cv2.VideoCapture(str(output / "clip.mp4"))
    sizes = []
    while (frame := capture.read())[0]:
        sizes.append(frame[1].shape)
    assert sizes == [(480, 640, 3)] * 3
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(10)


def test_a_video_that_is_not_complete_does_not_take_the_place_of_another(folder, tmp_path):
    partial, target = tmp_path / ".partial-out.mp4", tmp_path / "out.mp4"
    target.write_bytes(b"an older video")
    whole = (folder / "clip.avi").read_bytes()
    for content, frames in ((b"no video", 0), (whole, 3)):
        partial.write_bytes(content)
        with pytest.raises(UserError, match=f"only {frames} of 4 frames could .*out.mp4"):
            demo_tool.keep_video(partial, target, 4)
        assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"an older video"]
    partial.write_bytes(whole)
    demo_tool.keep_video(partial, target, 3)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [whole]


@pytest.mark.parametrize("rate, taken", [(29.97, 29.97), (90000.0, 25), (0.0, 25)])
def test_frame_rates_that_are_none(rate, taken):
    class Capture:
        def get(self, key):
            assert key == cv2.CAP_PROP_FPS
            return rate

    assert demo_tool.frame_rate(Capture(), "rtsp://camera") == taken


def test_frames_that_are_missing_are_said(folder, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lsnet_d2"), "propagate", True)
    detector = make_detector(folder, 0.99)
    demo_tool.run_on_video(detector, str(folder / "clip.avi"), str(tmp_path / "a.mp4"))
    assert "could be read" not in caplog.text
    monkeypatch.setattr(demo_tool, "frames", lambda capture: [capture.read()[1]])
    demo_tool.run_on_video(detector, str(folder / "clip.avi"), str(tmp_path / "b.mp4"))
    assert "clip.avi has 3 frames, but only 1 could be read" in caplog.text


def test_objects_of_a_video_keep_their_colours(folder, monkeypatch, tmp_path):
    """Two objects pass each other on lines of their own and come in another order each time."""
    writer = cv2.VideoWriter(
        str(tmp_path / "clip.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (320, 240)
    )
    for _ in range(12):
        writer.write(np.full((240, 320, 3), 90, np.uint8))
    writer.release()
    step = iter(range(12))
    lefts = []

    def predict(self, image):
        number = next(step)
        upper, lower = 20 + 20.0 * number, 240 - 20.0 * number
        lefts.append((upper, lower))
        boxes = torch.tensor([[upper, 40, upper + 60, 140], [lower, 120, lower + 60, 220]])
        order = [0, 1] if number % 2 else [1, 0]
        instances = Instances((240, 320))
        instances.pred_boxes = Boxes(boxes[order])
        instances.pred_classes = torch.zeros(2, dtype=torch.int64)
        return Results(instances, array_format="RGB")

    monkeypatch.setattr(demo_tool.LSNetPredictor, "__call__", predict)
    detector = make_detector(folder, 0.5)
    demo_tool.run_on_video(detector, str(tmp_path / "clip.avi"), str(tmp_path / "out.mp4"))
    capture = cv2.VideoCapture(str(tmp_path / "out.mp4"))
    palette = 255 * np.array(PALETTE[:2])
    for upper, lower in lefts:
        picture = capture.read()[1][:, :, ::-1].astype(float)
        # a stretch of each left side where the other box is not; the output is twice as large
        for left, y, expected in ((upper, slice(180, 220), 1), (lower, slice(300, 420), 0)):
            x = round(2 * left)
            patch = picture[y, x - 2 : x + 3].mean(axis=0)
            line = patch[np.abs(patch - 90).max(axis=1).argmax()]  # blurred by the codec
            direction = (line - 90) / np.linalg.norm(line - 90)
            wanted = (palette - 90) / np.linalg.norm(palette - 90, axis=1, keepdims=True)
            assert (wanted @ direction).argmax() == expected


@pytest.mark.parametrize(
    "args, message",
    [
        (["--input", "absent.jpg", "--output", "x"], "--input absent.jpg"),
        (["--input", "{folder}/images"], "no display"),
        (["--video-input", "absent.mp4", "--output", "x"], "cannot open the video absent.mp4"),
        (["--input", "{folder}/images", "--output", "{folder}/images"], "overwrite the input"),
        (["--input", "{folder}/images", "--output", "{folder}/tiny.yaml"], "must be a folder"),
        (["--input", "{folder}/images", "--output", "{folder}/tiny.yaml/x"], "cannot make"),
        (["--video-input", "{folder}/clip.avi", "--output", "{folder}/tiny.yaml"], "a folder"),
    ],
)
def test_user_errors(folder, args, message):
    result = demo(folder, *[arg.format(folder=folder) for arg in args])
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.stderr


def test_weights_of_another_model(folder):
    result = demo(
        folder,
        *["--input", folder / "images", "--output", folder / "x"],
        opts=["MODEL.RETINANET.NUM_CLASSES", 5],
    )
    assert result.returncode == 2
    assert "weights.pth is a checkpoint of another model" in result.stderr


def test_augmented(tmp_path):
    cfg = load_config(
        str(tiny_coco.write_config(tmp_path, "LSNet")),
        ["MODEL.DEVICE", "cpu", "TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(40, 60)"],
    )
    LSNetCheckpointer(build_model(cfg), str(tmp_path)).save("weights")
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    detector = demo_tool.Detector(cfg, 0.0, contours="outlined")
    assert isinstance(detector.predictor.model, LSNetWithTTA)
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    picture, count = detector.draw(noise)
    assert picture.shape == (480, 640, 3) and count > 0

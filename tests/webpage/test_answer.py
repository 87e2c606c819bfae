import base64
import io
import json
import tempfile

import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances
from PIL import ExifTags, Image

from lsnet_d2 import Results
from lsnet_d2.data.images import ImageError
from lsnet_d2.webpage.answer import MAX_SHOWN_SIDE, Limits, answer, clean_name, describe_skeleton

METADATA = Metadata(
    thing_classes=["bird", "box"],
    thing_dataset_id_to_contiguous_id={7: 0, 9: 1},
    keypoint_names=["head", "foot"],
    keypoint_connection_rules=[("head", "foot", (255, 120, 90))],
)


def encode(pixels, kind="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def grey(height, width, value=100):
    return np.full((height, width, 3), value, np.uint8)


def found(image):
    """Two detections, whatever the picture shows."""
    width, height = image.size
    instances = Instances((height, width))
    instances.pred_boxes = Boxes(torch.tensor([[1.0, 2.0, 11.0, 22.0], [3.0, 4.0, 9.0, 8.0]]))
    instances.scores = torch.tensor([0.75, 0.25])
    instances.pred_classes = torch.tensor([1, 0])
    instances.pred_extreme_points = torch.tensor(
        [[[5.0, 2], [1, 9], [6, 22], [11, 8]], [[4.0, 4], [3, 5], [8, 8], [9, 6]]]
    )
    instances.pred_contours = torch.tensor(
        [[[1.0, 2], [1, 22], [11, 22], [11, 2]], [[3.0, 4], [3, 8], [9, 8], [9, 4]]]
    )
    instances.pred_keypoints = torch.tensor([[[5.0, 6, 0.9], [7, 20, 0.01]]] * 2)
    return Results(instances, metadata=METADATA, array_format="RGB")


def ask(data, name="birds/two.png", predict=found, **limits):
    return answer(predict, data, name, limits=Limits(**limits))


def test_what_the_page_gets():
    content = json.loads(json.dumps(ask(encode(grey(30, 40)))))
    assert (content["name"], content["width"], content["height"]) == ("two.png", 40, 30)
    assert content["detections"] == [
        {"label": "box", "score": 0.75, "box": [1, 2, 11, 22]},
        {"label": "bird", "score": 0.25, "box": [3, 4, 9, 8]},
    ]
    assert content["extreme_points"][1] == [[4, 4], [3, 5], [8, 8], [9, 6]]
    assert [(r["category_id"], r["bbox"]) for r in content["coco"]] == [
        (9, [1, 2, 10, 20]),
        (7, [3, 4, 6, 4]),
    ]
    labelme = content["labelme"]
    assert labelme["imagePath"] == "two.png"
    # the second keypoint's score is below the threshold
    assert [(s["label"], s["group_id"]) for s in labelme["shapes"]] == [
        *(("box", 0), ("box", 0), ("head", 0)),
        *(("bird", 1), ("bird", 1), ("head", 1)),
    ]
    assert [
        (f["properties"]["object"], f["properties"]["part"]) for f in content["geojson"]["features"]
    ] == [(i, part) for i in (0, 1) for part in ("box", "contour", "keypoints")]


def shown(content):
    head, data = content["picture"].split(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_the_picture_is_upright_and_not_larger_than_needed():
    pixels = grey(20, 3000)
    pixels[:, :300] = (250, 10, 10)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 8  # to be turned counter-clockwise by a quarter
    sizes = []

    def upright(image):
        # the predictor turns it
        sizes.append(image.size)
        return found(Image.new("RGB", (20, 3000)))

    content = ask(encode(pixels, "JPEG", exif=exif), predict=upright)
    assert sizes == [(3000, 20)]
    assert (content["width"], content["height"]) == (20, 3000)
    with shown(content) as picture:
        assert picture.size == (13, MAX_SHOWN_SIDE)
        red, green, _ = picture.getpixel((6, MAX_SHOWN_SIDE - 20))
        assert red > 200 and green < 60


def test_16_bits_are_shown_as_the_model_sees_them():
    content = ask(encode(np.full((30, 40), 0x8040, np.uint16)))
    with shown(content) as picture:
        assert np.abs(np.asarray(picture).astype(int) - 0x80).max() <= 1


def fails(image):
    raise AssertionError("the model must not be asked")


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "not a complete image file: it begins like no kind of image that is known"),
        (b"no image", "not a complete image file: it begins like no kind of image that is known"),
        # PIL would start Ghostscript
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "begins like no kind of image"),
        (encode(grey(30, 40))[:-30], "not a complete image: "),
        (encode(grey(30, 41)), "41 x 30 pixels are more than the 0.0012 megapixels"),
    ],
    ids=["empty", "text", "postscript", "truncated", "large"],
)
def test_what_is_refused(data, message):
    with pytest.raises(ImageError, match=f"^two.png: .*{message}"):
        ask(data, predict=fails, megapixels=0.0012)


def test_what_just_fits():
    assert len(ask(encode(grey(30, 40)), megapixels=0.0012)["detections"]) == 2


def test_nothing_is_written_to_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    during = []

    def look(image):
        during.append(list(tmp_path.iterdir()))
        return found(image)

    ask(encode(np.random.default_rng(0).integers(0, 255, (900, 900, 3), np.uint8)), predict=look)
    assert during == [[]] and not list(tmp_path.iterdir())


def test_too_narrow_for_the_model_is_said_by_name(predictor):
    with pytest.raises(ImageError, match="^two.png: too narrow to be resized"):
        ask(encode(grey(1, 5000)), predict=predictor)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("a.jpg", "a.jpg"),
        ("../../etc/b.jpg", "b.jpg"),
        ("C:\\photos\\c.jpg", "c.jpg"),
        ("d\n\x1b[31m.jpg", "d[31m.jpg"),
        ("", "picture"),
        ("x" * 500 + ".jpg", "x" * 116 + ".jpg"),
    ],
)
def test_names(name, expected):
    assert clean_name(name) == expected


def test_skeletons():
    assert describe_skeleton(None) == []
    assert describe_skeleton(METADATA) == [{"ends": [["head"], ["foot"]], "color": "#ff785a"}]
    person = Metadata(keypoint_names=["nose", "left_hip"], keypoint_connection_rules=[])
    ends = [bone["ends"] for bone in describe_skeleton(person)]
    # as LandmarkPainter draws people's trunk
    assert ends == [
        [["nose"], ["left_shoulder", "right_shoulder"]],
        [["left_shoulder", "right_shoulder"], ["left_hip", "right_hip"]],
    ]

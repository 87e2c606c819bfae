import copy
import json
import pickle

import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools.cocoeval import COCOeval

from lsnet_d2 import Results
from lsnet_d2.data.images import ImageError
from lsnet_d2.data.polygons import signed_area
from lsnet_d2.errors import UserError
from lsnet_d2.ground_truth import coco_index
from lsnet_d2.visualizer import LSNetVisualizer

SIZE = (60, 100)  # height, width
BOXES = [[10.0, 10.0, 50.0, 40.0], [60.0, 5.0, 90.0, 55.0]]
# counter-clockwise on the screen, as the model's contours run
DIAMONDS = [
    [[(x0 + x1) / 2, y0], [x0, (y0 + y1) / 2], [(x0 + x1) / 2, y1], [x1, (y0 + y1) / 2]]
    for x0, y0, x1, y1 in BOXES
]
KEYPOINTS = [
    [[20.5, 15.5, 0.9], [40.5, 30.5, 0.8]],
    [[70.5, 15.5, 0.01], [80.5, 30.5, 0.6]],
]


def make_instances(*fields):
    instances = Instances(SIZE)
    instances.pred_boxes = Boxes(torch.tensor(BOXES))
    instances.scores = torch.tensor([0.75, 0.5])
    instances.pred_classes = torch.tensor([1, 0])
    points = torch.tensor(DIAMONDS)
    masks = torch.zeros((2, *SIZE), dtype=torch.bool)
    masks[0, 10:40, 10:50] = True
    masks[1, 5:20, 60:90] = masks[1, 30:50, 60:90] = True
    values = {
        "pred_extreme_points": points,
        "pred_contours": points,
        "pred_keypoints": torch.tensor(KEYPOINTS),
        "pred_masks": masks,
    }
    for name in fields:
        instances.set(name, values[name])
    return instances


ALL = ("pred_extreme_points", "pred_contours", "pred_keypoints")


@pytest.fixture
def metadata():
    metadata = Metadata()
    metadata.set(
        thing_classes=["fig", "nut"],
        thing_dataset_id_to_contiguous_id={3: 0, 7: 1},
        keypoint_names=["stem", "tip"],
        keypoint_flip_map=[],
        keypoint_connection_rules=[("stem", "tip", (1, 2, 3))],
    )
    return metadata


def ground_truth():
    annotations = [
        {
            "id": index + 1,
            "image_id": 4,
            "category_id": category,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": (x1 - x0) * (y1 - y0) / 2,
            "iscrowd": 0,
            "segmentation": [np.reshape(diamond, -1).tolist()],
            "keypoints": [v for x, y, _ in keypoints for v in (x - 0.5, y - 0.5, 2)],
            "num_keypoints": 2,
        }
        for index, (category, (x0, y0, x1, y1), diamond, keypoints) in enumerate(
            zip((7, 3), BOXES, DIAMONDS, KEYPOINTS, strict=True)
        )
    ]
    return coco_index(
        {
            "info": {},
            "images": [{"id": 4, "height": SIZE[0], "width": SIZE[1]}],
            "annotations": annotations,
            "categories": [{"id": 3, "name": "fig"}, {"id": 7, "name": "nut"}],
        }
    )


@pytest.mark.parametrize("task", ["bbox", "segm", "keypoints"])
def test_cocos_own_evaluation_takes_the_results(metadata, task):
    results = Results(make_instances(*ALL), metadata=metadata).to_coco(image_id=4)
    true = ground_truth()
    evaluation = COCOeval(true, true.loadRes(json.loads(json.dumps(results))), task)
    if task == "keypoints":
        evaluation.params.kpt_oks_sigmas = np.array([0.02, 0.02])
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)


def test_coco_results(metadata):
    instances = make_instances(*ALL)
    before = copy.deepcopy(instances.get_fields())
    first, second = Results(instances, metadata=metadata).to_coco(image_id=4)
    assert (first["image_id"], first["category_id"], first["score"]) == (4, 7, 0.75)
    assert first["bbox"] == [10, 10, 40, 30]
    assert first["extreme_points"] == first["contour"] == DIAMONDS[0]
    assert second["category_id"] == 3
    assert second["keypoints"] == pytest.approx([70, 15, 0.01, 80, 30, 0.6])
    for name, value in before.items():  # nothing was shifted in place
        after = instances.get(name)
        assert torch.equal(getattr(value, "tensor", value), getattr(after, "tensor", after))
    plain = Results(make_instances()).to_coco(image_id=4)
    assert [set(result) for result in plain] == [{"image_id", "category_id", "bbox", "score"}] * 2
    assert [result["category_id"] for result in plain] == [1, 0]


# What labelme 5 asks of a file and of a shape (LabelFile.load).
LABELME_KEYS = {"version", "flags", "shapes", "imagePath", "imageData"} | {
    "imageHeight",
    "imageWidth",
}
SHAPE_KEYS = {"label", "points", "group_id", "description", "shape_type", "flags", "mask"}


def test_labelme(metadata):
    results = Results(make_instances(*ALL), metadata=metadata, file_name="b/a.jpg")
    content = results.to_labelme()
    assert json.loads(json.dumps(content)) == content
    assert set(content) == LABELME_KEYS and content["imageData"] is None
    assert content["version"].startswith("5.") and content["imagePath"] == "a.jpg"
    assert (content["imageHeight"], content["imageWidth"]) == SIZE
    assert all(set(shape) == SHAPE_KEYS for shape in content["shapes"])
    found = [(s["group_id"], s["shape_type"], s["label"]) for s in content["shapes"]]
    assert found == [
        (0, "rectangle", "nut"),
        (0, "polygon", "nut"),
        (0, "point", "stem"),
        (0, "point", "tip"),
        (1, "rectangle", "fig"),
        (1, "polygon", "fig"),
        (1, "point", "tip"),  # the score of the other one is too low
    ]
    rectangle, polygon, point = content["shapes"][:3]
    assert rectangle["points"] == [[10, 10], [50, 40]] and rectangle["description"] == "0.750"
    assert polygon["points"] == DIAMONDS[0]
    assert point["points"] == [[20.5, 15.5]]


def test_geojson(metadata):
    content = Results(make_instances(*ALL), metadata=metadata).to_geojson()
    assert json.loads(json.dumps(content)) == content
    assert content["type"] == "FeatureCollection" and len(content["features"]) == 6
    box, contour, keypoints = content["features"][:3]
    assert box["properties"] == {"object": 0, "class": "nut", "score": 0.75, "part": "box"}
    assert box["geometry"] == {
        "type": "Polygon",
        "coordinates": [[[10, 10], [50, 10], [50, 40], [10, 40], [10, 10]]],
    }
    assert contour["geometry"]["type"] == "Polygon"
    (ring,) = contour["geometry"]["coordinates"]
    assert sorted(ring[:-1]) == sorted(DIAMONDS[0])
    for feature in content["features"]:
        assert feature["type"] == "Feature"
        if feature["geometry"]["type"] == "Polygon":
            (ring,) = feature["geometry"]["coordinates"]
            assert ring[0] == ring[-1] and len(ring) == 5
            assert signed_area(np.array(ring[:-1])) > 0  # in numbers: counter-clockwise
    assert keypoints["geometry"] == {
        "type": "MultiPoint",
        "coordinates": [[20.5, 15.5], [40.5, 30.5]],
    }
    assert keypoints["properties"]["names"] == ["stem", "tip"]
    assert keypoints["properties"]["scores"] == [0.9, 0.8]


def test_masks_are_outlined():
    """Of Detectron2's own models."""
    results = Results(make_instances("pred_masks"), file_name="a.png")
    one, two = results.to_geojson(parts=["contour"])["features"]
    assert one["geometry"]["type"] == "Polygon" and one["properties"]["class"] == "1"
    assert two["geometry"]["type"] == "MultiPolygon"
    areas = [
        signed_area(np.array(ring[:-1]))
        for polygon in two["geometry"]["coordinates"]
        for ring in polygon
    ]
    assert sorted(areas) == [450, 600]
    labels = [shape["label"] for shape in results.to_labelme(parts=["contour"])["shapes"]]
    assert labels == ["1", "0", "0"]


@pytest.mark.parametrize("form", ["to_labelme", "to_geojson"])
def test_parts(form):
    results = Results(make_instances("pred_keypoints"), file_name="a.png")
    for parts in (["contour"], ["masks"]):
        with pytest.raises(ValueError, match=f"part '{parts[0]}': the detections have box, keypo"):
            getattr(results, form)(parts=parts)
    content = getattr(results, form)(parts=["keypoints"], keypoint_threshold=0.7)
    assert len(content["shapes"] if form == "to_labelme" else content["features"]) == (
        2 if form == "to_labelme" else 1
    )


def test_keypoints_of_classes_without_any_are_not_written():
    """Their score is 0; pictures leave them out too."""
    instances = make_instances("pred_keypoints")
    instances.pred_keypoints[..., 2] = 0
    results = Results(instances, file_name="a.png")
    features = results.to_geojson(parts=["keypoints"], keypoint_threshold=0.0)["features"]
    assert all(not feature["geometry"]["coordinates"] for feature in features)
    labelme = results.to_labelme(parts=["keypoints"], keypoint_threshold=0.0)
    assert labelme["shapes"] == []


def test_nothing_was_found(metadata):
    results = Results(make_instances(*ALL)[:0], metadata=metadata, file_name="a.png")
    assert results.to_coco(image_id=4) == []
    assert results.to_labelme()["shapes"] == []
    assert results.to_geojson() == {"type": "FeatureCollection", "features": []}


def test_drawing(metadata, tmp_path):
    pixels = np.zeros((*SIZE, 3), np.uint8)
    pixels[..., 0] = 200
    Image.fromarray(pixels).save(tmp_path / "red.png")
    instances = make_instances(*ALL)
    results = Results(instances, metadata=metadata, file_name=tmp_path / "red.png")
    picture = results.draw(contours="outlined")
    assert isinstance(picture, Image.Image) and picture.size == (640, 384)
    colors = {color for _, color in picture.getcolors(1 << 20)}
    assert (200, 0, 0) in colors and len(colors) > 10
    drawn = LSNetVisualizer(pixels, metadata, contours="outlined")
    expected = drawn.draw_instance_predictions(instances).get_image()
    np.testing.assert_array_equal(picture, expected)
    for array_format, image in (("RGB", pixels), ("BGR", pixels[..., ::-1])):
        results = Results(instances, metadata=metadata, array_format=array_format)
        for given in (image, Image.fromarray(pixels), tmp_path / "red.png"):
            np.testing.assert_array_equal(results.draw(given, contours="outlined"), expected)
    other = results.draw(Image.fromarray(pixels), contours="outlined", identities=[1, 0])
    assert not np.array_equal(other, expected)


def test_drawing_on_what_is_not_the_image(metadata, tmp_path):
    results = Results(make_instances(), metadata=metadata)
    with pytest.raises(ValueError, match="of no file: give the image to draw on"):
        results.draw()
    with pytest.raises(ImageError, match="has 60 x 100 pixels, .* of one with 100 x 60"):
        results.draw(np.zeros((100, 60, 3), np.uint8))
    with pytest.raises(ImageError, match="gone.png: no such image file"):
        Results(make_instances(), file_name=tmp_path / "gone.png").draw()


def test_images_of_no_file_have_a_path_in_labelme(metadata):
    results = Results(make_instances(), metadata=metadata)
    with pytest.raises(ValueError, match="give the image_path"):
        results.to_labelme()
    assert results.to_labelme(image_path="../a.jpg")["imagePath"] == "../a.jpg"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_they_are_instances(metadata, copied):
    instances = make_instances(*ALL)
    results = Results(instances, metadata=metadata, file_name="b/a.jpg")
    assert isinstance(results, Instances) and results.image_size == SIZE
    assert results.pred_boxes is instances.pred_boxes
    for some in (results[results.scores < 0.6], results[1], results.to("cpu")[1:], copied(results)):
        assert isinstance(some, Results)
        assert (some.file_name, some.metadata.thing_classes) == ("b/a.jpg", ["fig", "nut"])
        assert some.to_geojson()["features"][-1]["properties"]["class"] == "fig"
        assert some.to_coco(image_id=4) == results.to_coco(image_id=4)[-len(some) :]
    assert Results.cat([results, results]).scores.tolist() == [0.75, 0.5] * 2


def test_metadata_of_another_model(metadata):
    instances = make_instances(*ALL)
    instances.pred_classes = torch.tensor([1, 2])
    results = Results(instances, metadata=metadata)
    classes = [f["properties"]["class"] for f in results.to_geojson(parts=["box"])["features"]]
    assert classes == ["nut", "2"]
    with pytest.raises(UserError, match="the model predicts class 2, .* has classes 0 to 1"):
        results.to_coco(image_id=4)
    metadata.keypoint_names.append("leaf")
    with pytest.raises(UserError, match="name 3 keypoints, but an object has 2"):
        results.to_geojson()

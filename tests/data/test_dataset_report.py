import copy
import json

import numpy as np
import pytest
from PIL import Image

from lsnet_d2.data.coco_json import load_lsnet_json, read_coco_json
from lsnet_d2.data.dataset_report import report_dataset
from lsnet_d2.data.dataset_statistics import format_statistics

SIZE = (60, 100)  # height, width
POLYGON = [30, 10, 20, 25, 45, 50, 60, 35]
NAN = float("nan")


@pytest.fixture
def data(tmp_path):
    """Two good images with an object each."""
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(tmp_path / name)
    return {
        "info": {"year": 2026},
        "images": [
            {"id": 1, "file_name": "a.png", "height": 60, "width": 100},
            {"id": 2, "file_name": "b.png", "height": 60, "width": 100},
        ],
        "annotations": [
            {
                "id": 11,
                "image_id": 1,
                "category_id": 3,
                "bbox": [20, 10, 40, 40],
                "segmentation": [POLYGON],
                "keypoints": [30, 10, 2, 0, 0, 0],
                "num_keypoints": 1,
                "area": 900.0,
            },
            {"id": 12, "image_id": 2, "category_id": 7, "bbox": [0, 0, 50.5, 60]},
        ],
        "categories": [
            {"id": 3, "name": "fig", "keypoints": ["stem", "tip"], "skeleton": [[1, 2]]},
            {"id": 7, "name": "nut"},
        ],
    }


def check(data, tmp_path, **options):
    """The report; the input stays as it is, and what is repaired has no problem any more."""
    before = copy.deepcopy(data)
    report = report_dataset(data, tmp_path, **options)
    assert json.dumps(data) == json.dumps(before)
    again = report_dataset(report.repaired, tmp_path, **options)
    assert again.problems == report.remaining
    return report


def one_problem(data, tmp_path, **options):
    report = check(data, tmp_path, **options)
    assert len(report.problems) == 1, report.problems
    return report.problems[0], report.repaired


@pytest.mark.parametrize("decode_images", [True, False])
def test_good_data_stay_as_they_are(data, tmp_path, decode_images):
    report = check(data, tmp_path, decode_images=decode_images)
    assert report.problems == [] and report.has_usable_lists
    assert report.repaired == data


@pytest.mark.parametrize(
    ("changes", "text", "expected"),
    [
        ({"bbox": [20, 10, 0, 40]}, "[20, 10, 0, 40] has no width", {"bbox": [20, 10, 40, 40]}),
        ({"bbox": [100, 0, 9, 9]}, "lies outside its image of 100 x", {"bbox": [20, 10, 40, 40]}),
        ({"bbox": [20, 10, NAN, 40]}, "is not four finite numbers", {"bbox": [20, 10, 40, 40]}),
        (
            {"bbox": [[20, 10], [40, 40]]},
            "its box [[20, 10], [40, 40]] is not four",
            {"bbox": [20, 10, 40, 40]},
        ),
        ({"bbox": None}, "its box None is not four", {"bbox": [20, 10, 40, 40]}),
        ({"segmentation": POLYGON}, "a flat list of numbers", {"segmentation": [POLYGON]}),
        ({"segmentation": [[10**400, *POLYGON[1:]]]}, "int too large", {"segmentation": None}),
        (
            {"segmentation": [POLYGON, [1, 2, 3, 4]]},
            "polygon number 1 encloses nothing",
            {"segmentation": [POLYGON]},
        ),
        (
            {"segmentation": [[NAN, *POLYGON[1:]], POLYGON]},
            "polygon number 0 has coordinates that are not finite",
            {"segmentation": [POLYGON]},
        ),
        (
            {"segmentation": [[200, 0, 300, 0, 300, 50]]},
            "polygon number 0 lies outside its image",
            {"segmentation": []},
        ),
        ({"segmentation": [POLYGON[:-1]]}, "a polygon of 7 numbers", {"segmentation": None}),
        (
            {"segmentation": {"size": [100, 60], "counts": [6000]}},
            "an RLE of (height, width) [100, 60]",
            {"segmentation": None},
        ),
        (
            {"segmentation": {"size": [60, 100], "counts": [10, 20]}},
            "the counts of an RLE sum up to 30, not 6000",
            {"segmentation": None},
        ),
        (
            {"keypoints": [30, 10, 2]},
            "3 numbers of keypoints, not 6",
            {"keypoints": [], "num_keypoints": 0},
        ),
        (
            {"keypoints": [30, 10, 2, NAN, 0, 1]},
            "its keypoints are not finite triples",
            {"keypoints": [30, 10, 2, 0, 0, 0]},
        ),
        (
            {"keypoints": [30, 10, 2, 1e10, 5, 2]},
            "its keypoints are not finite triples",
            {"keypoints": [30, 10, 2, 0, 0, 0]},
        ),
        ({"num_keypoints": 2}, "its num_keypoints is 2, but 1 are labelled", {"num_keypoints": 1}),
        ({"extreme_points": [1, 2]}, "extreme_points must be four", {"extreme_points": None}),
        ({"area": NAN}, "its area is nan", {"area": None}),
    ],
)
def test_repairs_of_an_object(data, tmp_path, changes, text, expected):
    data["annotations"][0].update(changes)
    report = check(data, tmp_path)
    problem = report.problems[0]
    assert problem.where == "annotation 11 of image a.png"
    assert text in problem.text and problem.repair
    assert {key: report.repaired["annotations"][0].get(key) for key in expected} == expected
    assert len(report.repaired["annotations"]) == 2 and not report.remaining
    path = tmp_path / "repaired.json"
    path.write_text(json.dumps(report.repaired))
    assert len(load_lsnet_json(path, tmp_path, f"repaired {tmp_path.name}")) == 2


def test_ids_of_annotations_are_all_numbers_or_all_text(data, tmp_path):
    data["annotations"][1]["id"] = "12"
    report = check(data, tmp_path)
    message = "some ids of 'annotations' are numbers and some are text"
    assert [problem.text for problem in report.remaining] == [message]
    data["annotations"][0]["id"] = "1"
    data["annotations"] += [{**data["annotations"][1], "id": identity} for identity in ("12", "2")]
    data["annotations"][2]["bbox"] = [1, 1, 9, 9]
    report = check(data, tmp_path)
    assert not report.remaining
    assert [a["id"] for a in report.repaired["annotations"]] == ["1", "12", "3", "2"]


def test_a_category_that_is_no_id_has_no_statistics(data, tmp_path):
    data["annotations"][1]["category_id"] = [7]
    report = check(data, tmp_path)
    assert [str(problem) for problem in report.problems] == [
        "annotation 12 of image b.png: category [7] is not in the list of categories"
    ]
    assert "fig" in format_statistics(report.repaired)


def test_all_problems_of_an_object_are_listed(data, tmp_path):
    data["annotations"][1].update(
        bbox=[0, 0, 0, 0], segmentation=[[1, 2]], keypoints=[1], category_id=9, area=NAN
    )
    report = check(data, tmp_path)
    assert [str(problem) for problem in report.problems] == [
        "annotation 12 of image b.png: category 9 is not in the list of categories [left out]",
        "annotation 12 of image b.png: polygon number 0 encloses nothing [left out]",
        "annotation 12 of image b.png: 1 numbers of keypoints, which are no triples [left out]",
        "annotation 12 of image b.png: its area is nan [left out]",
        "annotation 12 of image b.png: its box [0, 0, 0, 0] has no width or no height [left out]",
    ]
    assert [a["id"] for a in report.repaired["annotations"]] == [11]


def test_what_only_the_owner_knows_is_left(data, tmp_path):
    data["annotations"][0]["keypoints"][2] = 3
    data["annotations"][1]["category_id"] = 8
    data["images"][1]["width"] = 90
    report = check(data, tmp_path)
    assert [problem.text for problem in report.remaining] == [
        "it is said to have 90 x 60 pixels, but has 100 x 60 (the annotations may be of another "
        "version of it)",
        "keypoints with the visibility 3; it must be 0, 1 or 2",
        "category 8 is not in the list of categories",
    ]
    assert report.repaired == data and report.has_usable_lists


@pytest.mark.parametrize("decode_images", [True, False])
def test_turned_images_have_the_size_that_is_seen(data, tmp_path, decode_images):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((100, 60, 3), np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    data["images"][0]["file_name"] = "a.jpg"
    assert check(data, tmp_path, decode_images=decode_images).problems == []


def test_images_that_cannot_be_read(data, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) // 2])
    data["images"][0]["file_name"] = "a.jpg"
    data["images"][1]["file_name"] = "gone.png"
    first, second, nothing_left = check(data, tmp_path).problems
    assert (first.where, second.where) == ("image 1 (a.jpg)", "image 2 (gone.png)")
    assert "not a complete image file" in first.text and "no such image file" in second.text
    assert first.repair == "left out, with its 1 annotations"
    assert nothing_left.text == "there is no image that can be read"
    # the head of the truncated one is whole
    problem, repaired = one_problem(data, tmp_path, decode_images=False)
    assert problem.where == "image 2 (gone.png)"
    assert [a["id"] for a in repaired["annotations"]] == [11]
    assert [image["id"] for image in repaired["images"]] == [1]


@pytest.mark.parametrize("width", [None, 0, "100", NAN])
def test_sizes_that_are_none_are_taken_from_the_image(data, tmp_path, width):
    data["images"][0]["width"] = width
    problem, repaired = one_problem(data, tmp_path)
    assert problem.text == f"its width and height are {width!r} and 60"
    assert repaired["images"][0] == {**data["images"][0], "width": 100}


def test_ids(data, tmp_path):
    images, annotations = data["images"], data["annotations"]
    annotations += [dict(annotations[0]), {**annotations[1], "id": 11}, {**annotations[1]}]
    del annotations[-1]["id"]
    annotations.append({**annotations[1], "id": 30, "image_id": 5})
    images.append(dict(images[0]))
    report = check(data, tmp_path)
    assert [str(problem) for problem in report.problems] == [
        "image 1 (a.png): occurs twice [once]",
        "annotation 30: image 5 is not in the list of images [left out]",
        "annotation 11 of image a.png: occurs twice [once]",
        "annotation 11 of image b.png: has the id of annotation 11 of image a.png [id 13]",
        "annotation number 0 of image b.png: its id is None [id 14]",
    ]
    assert [a["id"] for a in report.repaired["annotations"]] == [11, 12, 13, 14]
    path = tmp_path / "repaired.json"
    path.write_text(json.dumps(report.repaired))
    assert read_coco_json(path) == report.repaired


def test_ids_that_stand_for_two(data, tmp_path):
    data["images"].append({**data["images"][0], "file_name": "b.png"})
    data["categories"].append({"id": 7, "name": "date"})
    report = check(data, tmp_path)
    assert [str(problem) for problem in report.remaining] == [
        "category 7 (date): has the id of category 7 (nut)",
        "image 1 (b.png): has the id of image 1 (a.png)",
    ]


@pytest.mark.parametrize(
    ("key", "entries", "text"),
    [
        ("categories", [], "there are no categories"),
        ("categories", [{"id": 3, "name": "a"}, {"id": 7, "name": "a"}], "2 categories have the"),
        (
            "categories",
            [{"id": 3}, {"id": 7, "name": "a"}],
            "entry 3 of 'categories' has no 'name'",
        ),
        ("categories", [{"id": 3, "name": "a", "keypoints": ["x", "x"]}], "'a' has two keypoints"),
        (
            "categories",
            [{"id": 3, "name": "a"}, {"id": "7", "name": "b"}],
            "ids of 'categories' are",
        ),
        ("categories", [{"id": 3, "name": "a", "keypoints": 5}], "are not a list of names"),
        ("images", [], "there is no image that can be read"),
    ],
)
def test_lists_that_cannot_be_used(data, tmp_path, key, entries, text):
    data[key] = entries
    report = check(data, tmp_path)
    assert any(text in problem.text for problem in report.remaining)
    assert not report.has_usable_lists


def test_entries_that_are_none(data, tmp_path):
    data["annotations"] += [
        7,
        {"id": 20, "image_id": 1},
        {**data["annotations"][1], "image_id": []},
    ]
    data["images"] += [{"id": 4}, {"id": [], "file_name": "a.png"}]
    report = check(data, tmp_path)
    assert [problem.text for problem in report.problems] == [
        "entry 4 of 'images' has no 'file_name'",
        "entry number 3 of 'images' has the id []",
        "entry 2 of 'annotations' has no 'id', 'image_id', 'category_id', 'bbox'",
        "entry 20 of 'annotations' has no 'category_id'",
        "image [] is not in the list of images",
    ]
    assert [a["id"] for a in report.repaired["annotations"]] == [11, 12]


def test_ids_that_are_whole_numbers_with_a_point(data, tmp_path):
    """As pandas writes them, where a column has gaps."""
    for entry in (*data["images"], *data["annotations"]):
        for key in entry.keys() & {"id", "image_id", "category_id"}:
            entry[key] = float(entry[key])
    assert not check(data, tmp_path).problems


def test_keypoints_without_names(data, tmp_path):
    del data["categories"][0]["keypoints"]
    problem, _ = one_problem(data, tmp_path)
    assert str(problem) == (
        "category 3 (fig): 1 of its annotations have keypoints, but it has no list 'keypoints' of "
        "their names"
    )
    for annotation in data["annotations"]:
        annotation.update(keypoints=[0] * 6, num_keypoints=0)
    assert not check(data, tmp_path).problems

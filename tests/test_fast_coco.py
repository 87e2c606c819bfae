"""Figures are pycocotools', to the last bit."""

import numpy as np
import pytest
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from pycocotools import mask as mask_util

from lsnet_d2.fast_coco import FastCOCOeval
from lsnet_d2.ground_truth import coco_index

HEIGHT, WIDTH, CLASSES, KEYPOINTS = 240, 320, 5, 7
SIGMAS = np.linspace(0.03, 0.12, KEYPOINTS)


def polygon(box, rng):
    """An ellipse in a box, a bit irregular."""
    x, y, width, height = box
    turn = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    radius = rng.uniform(0.8, 1, 12)
    vertices = np.stack([np.cos(turn) * radius, np.sin(turn) * radius], axis=1) / 2 + 0.5
    return (vertices * [width, height] + [x, y]).ravel().tolist()


def pose(box, rng):
    places = rng.uniform(size=(KEYPOINTS, 2)) * box[2:] + box[:2]
    return np.column_stack([places, rng.integers(0, 3, KEYPOINTS)])


def moved(box, rng, by):
    box = np.array(box) + by * box[2] * rng.normal(size=4)
    return [*box[:2].tolist(), *box[2:].clip(2).tolist()]


def to_rle(vertices):
    (rle,) = mask_util.frPyObjects([vertices], HEIGHT, WIDTH)
    return {**rle, "counts": rle["counts"].decode()}


def make_case(seed, images=30, per_image=8):
    """A data set and detections with crowds, doubles, confused classes, equal scores, objects
    without keypoints, an image without objects, one without detections, a class without either."""
    rng = np.random.default_rng(seed)
    annotations, results = [], []
    for image in range(1, images + 1):
        for _ in range(0 if image == 1 else per_image):
            size = rng.uniform(6, 120)
            box = [*rng.uniform(0, 150, 2).tolist(), size, size * rng.uniform(0.5, 2)]
            category = int(rng.integers(1, CLASSES))
            keypoints = pose(box, rng)
            keypoints[:, 2] *= rng.uniform() < 0.8
            vertices, crowd = polygon(box, rng), int(rng.uniform() < 0.1)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": category,
                    "bbox": box,
                    "area": box[2] * box[3] * 0.7,
                    "iscrowd": crowd,
                    "segmentation": to_rle(vertices) if crowd else [vertices],
                    "keypoints": keypoints.ravel().tolist(),
                    "num_keypoints": int((keypoints[:, 2] > 0).sum()),
                }
            )
            if image == 2:
                continue
            for by in rng.choice([0.02, 0.1, 0.4], size=rng.integers(0, 4)):
                found = moved(box, rng, by)
                places = keypoints[:, :2] + rng.normal(size=(KEYPOINTS, 2)) * by * box[2]
                score = np.full((KEYPOINTS, 1), 0.5)
                results.append(
                    {
                        "image_id": image,
                        "category_id": int(
                            category if rng.uniform() < 0.8 else rng.integers(1, CLASSES)
                        ),
                        "bbox": found,
                        "segmentation": to_rle(polygon(found, rng)),
                        "keypoints": np.hstack([places, score]).ravel().tolist(),
                        "score": float(rng.integers(1, 20) / 20),
                    }
                )
    data = {
        "info": {},
        "images": [{"id": i + 1, "height": HEIGHT, "width": WIDTH} for i in range(images)],
        "categories": [{"id": i + 1, "name": str(i)} for i in range(CLASSES)],
        "annotations": annotations,
    }
    return data, results


def evaluate(make, task, max_dets=None, image_ids=None):
    evaluation = make()
    if task == "keypoints":
        evaluation.params.kpt_oks_sigmas = SIGMAS
    elif max_dets:
        evaluation.params.maxDets = max_dets
    if image_ids:
        evaluation.params.imgIds = image_ids
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def columns(results, task):
    keys = {"bbox": ["bbox"], "segm": ["segmentation"], "keypoints": ["keypoints", "bbox"]}[task]
    return [{k: r[k] for k in ("image_id", "category_id", "score", *keys)} for r in results]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("bbox", {}),
        ("bbox", {"max_dets": [1, 3, 5]}),
        ("bbox", {"image_ids": [1, 2, 5, 7]}),
        ("segm", {}),
        ("segm", {"max_dets": [200, 1, 10]}),
        ("keypoints", {}),
        ("keypoints", {"image_ids": [3, 4]}),
    ],
)
def test_figures_are_those_of_pycocotools(seed, task, options):
    data, results = make_case(seed)
    true, found = coco_index(data), columns(results, task)
    ours = evaluate(lambda: FastCOCOeval(true, found, task), task, **options)
    theirs = evaluate(
        lambda: COCOevalMaxDets(true, true.loadRes([dict(r) for r in found]), task), task, **options
    )
    assert 0.01 < theirs.stats[0] < 0.99
    assert ours.stats.tolist() == theirs.stats.tolist()
    for name in ("precision", "recall", "scores"):
        assert ours.eval[name].shape == theirs.eval[name].shape
        assert np.array_equal(ours.eval[name], theirs.eval[name]), name


@pytest.mark.parametrize("task", ["bbox", "segm", "keypoints"])
def test_ids_do_not_matter(task):
    """pycocotools takes an object of id 0 for "not matched"."""
    data, results = make_case(0)
    found = columns(results, task)
    stats = evaluate(lambda: FastCOCOeval(coco_index(data), found, task), task).stats.tolist()
    annotations = [{**a, "id": a["id"] - 1} for a in data["annotations"]]
    other = coco_index({**data, "annotations": annotations})
    assert evaluate(lambda: FastCOCOeval(other, found, task), task).stats.tolist() == stats


def test_nothing_is_written_into_data():
    data, results = make_case(0, images=5)
    before = repr(data), repr(results)
    evaluate(lambda: FastCOCOeval(coco_index(data), results, "bbox"), "bbox")
    assert (repr(data), repr(results)) == before


def test_results_of_unknown_images():
    data, results = make_case(0, images=5)
    evaluation = FastCOCOeval(coco_index(data), [{**results[0], "image_id": 77}], "bbox")
    with pytest.raises(ValueError, match="image 77"):
        evaluation.evaluate()

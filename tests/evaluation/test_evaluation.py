import json
from types import SimpleNamespace

import pytest
import tiny_coco
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import print_csv_format
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_util
from tiny_coco import change_annotations, registered_cfg
from tiny_evaluation import (
    add_keypoints,
    contour,
    evaluate,
    evaluate_tasks,
    keypoints,
    predictions,
    run,
)

import lsnet_d2.evaluation
from lsnet_d2.data.coco_json import register_lsnet_instances
from lsnet_d2.evaluation import (
    COCO_OKS_SIGMAS,
    LSNetEvaluator,
    build_evaluator,
    evaluation_tasks,
    oks_sigmas,
)


def test_perfect_predictions(coco):
    results = evaluate(coco, predictions(1), predictions(2))["bbox"]
    assert results["AP"] == pytest.approx(100)
    assert results["AP-person"] == results["AP-car"] == pytest.approx(100)


def test_shifted_predictions(coco):
    # moved by 4 of 24 pixels: IoU 20/28 = 0.714, right at the thresholds 0.5, 0.55, ... 0.7
    results = evaluate(coco, predictions(1, 4.0), predictions(2, 4.0))["bbox"]
    assert results["AP"] == pytest.approx(50)
    assert results["AP50"] == pytest.approx(100)
    assert results["AP75"] == pytest.approx(0)


def test_limit_of_detections(coco):
    """The object is the 101st of what is found."""
    image, output = predictions(1)
    right = output["instances"]
    wrong = Instances(tiny_coco.SIZE)
    wrong.pred_boxes = Boxes(torch.tensor([[50.0, 40.0, 60.0, 46.0]]).repeat(100, 1))
    wrong.scores = torch.full((100,), 0.95)
    wrong.pred_classes = right.pred_classes.repeat(100)
    outputs = (image, {"instances": Instances.cat([wrong, right])}), predictions(2)
    assert evaluate(coco, *outputs)["bbox"]["AP-person"] == 0
    assert evaluate(coco, *outputs, max_dets=300)["bbox"]["AP-person"] > 0


def test_results_file_has_extreme_points(coco):
    points = torch.tensor([[[20.5, 10], [12, 15], [21, 30], [36, 20]]])
    evaluate(coco, predictions(1, pred_extreme_points=points), predictions(2))
    path = coco / "results" / "coco_instances_results.json"
    first, second = json.loads(path.read_text())
    assert first["extreme_points"] == points[0].tolist()
    assert first["category_id"] == 1 and first["bbox"] == [12, 10, 24, 20]
    assert "extreme_points" not in second


def test_predicted_keypoints_are_left_alone(coco):
    keypoints = torch.full((1, 17, 3), 5.0)
    image, output = predictions(1, pred_keypoints=keypoints)
    evaluator = build_evaluator(registered_cfg(coco), "tiny_val", None)
    evaluator.reset()
    evaluator.process([image], [output])
    assert (output["instances"].pred_keypoints == 5).all()


def test_incomplete_ground_truth(coco):
    with tiny_coco.edited(coco, "val") as dataset:
        del dataset["info"]
        for number, annotation in enumerate(dataset["annotations"]):
            del annotation["area"], annotation["iscrowd"]
            annotation["id"] = number  # pycocotools takes 0 for "not matched"
    results = evaluate(coco, predictions(1), predictions(2))["bbox"]
    assert results["AP"] == results["APs"] == pytest.approx(100)


def test_other_kinds_of_values_than_cocos_own(coco):
    """As other tools write them; the loader takes them too."""
    with tiny_coco.edited(coco, "val") as dataset:
        for image in dataset["images"]:
            image |= {"id": f"photo {image['id']}", "date_captured": 0, "license": ""}
        for category in dataset["categories"]:
            category |= {"id": -category["id"], "supercategory": 1}
        for annotation in dataset["annotations"]:
            annotation["image_id"] = f"photo {annotation['image_id']}"
            annotation["category_id"] *= -1
            annotation |= {"id": f"object {annotation['id']}", "iscrowd": None, "area": None}
    outputs = [predictions(i, pred_contours=contour(i)) for i in (1, 2)]
    for image, output in outputs:
        # by ascending id the classes are in the opposite order
        output["instances"].pred_classes = 79 - output["instances"].pred_classes
        image["image_id"] = f"photo {image['image_id']}"
    results = evaluate_tasks(coco, ("bbox", "segm"), *outputs)
    assert results["bbox"]["AP"] == results["segm"]["AP"] == pytest.approx(100)
    assert results["bbox"]["AP-person"] == results["bbox"]["AP-car"] == pytest.approx(100)
    assert results["landmarks"]["contour_px-car"] == pytest.approx(0, abs=0.1)


def test_objects_to_ignore_are_no_misses(coco):
    """As in training and in the errors of landmarks."""

    def ignore_the_second(annotation):
        annotation["ignore"] = int(annotation["id"] == 2)

    change_annotations(coco, "val", ignore_the_second)
    images = MetadataCatalog.get("tiny_val").image_root
    DatasetCatalog.remove("tiny_val")
    MetadataCatalog.remove("tiny_val")
    # Detectron2's loader refuses such files
    register_lsnet_instances("tiny_val", tiny_coco.json_file(coco, "val"), images)
    results = evaluate_tasks(coco, ("bbox",), predictions(1, 4.0))
    assert results["bbox"]["AP"] == pytest.approx(50)
    assert results["bbox"]["AP-car"] != results["bbox"]["AP-car"]


def test_classes_with_ids_of_text(coco):
    with tiny_coco.edited(coco, "val") as dataset:
        for entry in dataset["categories"]:
            entry["id"] = f"class {entry['id']:02}"
        for annotation in dataset["annotations"]:
            annotation["category_id"] = f"class {annotation['category_id']:02}"
    outputs = [predictions(i, pred_contours=contour(i)) for i in (1, 2)]
    results = evaluate_tasks(coco, ("bbox", "segm"), *outputs)
    assert results["segm"]["AP-person"] == results["segm"]["AP-car"] == pytest.approx(100)
    assert results["landmarks"]["contour_objects-person"] == 1


def test_without_annotations_only_results_are_written(coco):
    with tiny_coco.edited(coco, "val") as dataset:
        del dataset["annotations"]
    assert evaluate(coco, predictions(1)) == {}
    assert len(json.loads((coco / "results" / "coco_instances_results.json").read_text())) == 1


def test_tasks_follow_the_branches(coco):
    cfg = registered_cfg(coco)
    assert evaluation_tasks(cfg) is None
    cfg.MODEL.META_ARCHITECTURE = "LSNet"
    assert evaluation_tasks(cfg) == ("bbox",)


@pytest.mark.parametrize(
    "fields, tasks",
    [
        (["pred_contours"], ("bbox", "segm")),
        (["pred_keypoints"], ("bbox", "keypoints")),
        (["pred_keypoints", "pred_extreme_points", "pred_contours"], ("bbox", "segm", "keypoints")),
    ],
)
def test_tasks_of_several_branches(coco, monkeypatch, fields, tasks):
    cfg = registered_cfg(coco)
    cfg.MODEL.META_ARCHITECTURE = "LSNet"
    branches = [SimpleNamespace(pred_field=field) for field in fields]
    monkeypatch.setattr(lsnet_d2.evaluation, "build_branches", lambda cfg: branches)
    assert evaluation_tasks(cfg) == tasks


def test_contours(coco):
    outputs = [predictions(i, pred_contours=contour(i)) for i in (1, 2)]
    results = evaluate_tasks(coco, ("bbox", "segm"), *outputs)
    assert list(results) == ["bbox", "segm", "landmarks"]
    assert results["segm"]["AP"] == results["segm"]["AP-car"] == pytest.approx(100)
    assert results["landmarks"]["contour_px"] == pytest.approx(0, abs=1e-6)
    assert results["landmarks"]["contour_objects"] == 2
    assert results["landmarks"]["contour_objects-car"] == 1


def test_half_a_contour(coco):
    # a mask of half the object counts at the threshold 0.5, its box is right
    outputs = [predictions(i, pred_contours=contour(i, width=12.0)) for i in (1, 2)]
    results = evaluate_tasks(coco, ("bbox", "segm"), *outputs)
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results["segm"]["AP"] == pytest.approx(10)
    assert results["segm"]["AP50"] == pytest.approx(100)


def test_area_of_a_mask_is_its_own(coco):
    # A wrong contour of 360 pixels in a box of 1800 > 32^2. By the box it would be of medium
    # size, and not count among the small ones. So it stands in front of the right one, and halves
    # the precision for persons; the car is missed.
    wrong = torch.tensor([[[0.0, 0], [40, 0], [40, 9], [0, 9]]])
    image, output = predictions(1, pred_contours=wrong)
    output["instances"].pred_boxes = Boxes(torch.tensor([[0.0, 0, 60, 30]]))
    right = predictions(1, pred_contours=contour(1))
    right[1]["instances"].scores[:] = 0.5
    results = evaluate_tasks(coco, ("segm",), (image, output), right)
    assert results["segm"]["APs"] == pytest.approx((50 + 0) / 2)


def test_results_file_has_contours_and_masks(coco):
    points = contour(1) + torch.tensor([0.123456, 0.0])
    evaluate_tasks(coco, ("segm",), predictions(1, pred_contours=points))
    (result,) = json.loads((coco / "out" / "coco_instances_results.json").read_text())
    assert result["contour"] == [[12.12, 10], [36.12, 10], [36.12, 30], [12.12, 30]]
    assert result["segmentation"]["size"] == list(tiny_coco.SIZE)
    assert mask_util.area(result["segmentation"]) == 24 * 20
    assert set(result) == {*("image_id", "category_id", "bbox", "score", "segmentation", "contour")}
    saved = torch.load(coco / "out" / "instances_predictions.pth", weights_only=True)
    assert torch.equal(saved[0]["landmarks"]["pred_contours"], points)


def test_contours_take_the_place_of_masks(coco):
    masks = torch.zeros(1, *tiny_coco.SIZE, dtype=torch.bool)
    image, output = predictions(1, pred_contours=contour(1), pred_masks=masks)
    results = evaluate_tasks(coco, ("segm",), (image, output))
    assert results["segm"]["AP-person"] == pytest.approx(100)
    assert output["instances"].has("pred_masks")


def test_masks_without_contours(coco):
    # as Detectron2's Mask R-CNN gives them, scored without being told
    masks = torch.zeros(1, *tiny_coco.SIZE, dtype=torch.bool)
    masks[0, 10:30, 12:36] = True
    results = evaluate(coco, predictions(1, pred_masks=masks))
    assert results["segm"]["AP-person"] == pytest.approx(100)
    assert "landmarks" not in results


def test_objects_with_a_box_only_are_no_misses_of_masks(coco):
    change_annotations(coco, "val", lambda a: a.pop("segmentation") if a["id"] == 2 else None)
    outputs = [predictions(i, pred_contours=contour(i)) for i in (1, 2)]
    results = evaluate_tasks(coco, ("bbox", "segm"), *outputs)
    assert results["bbox"]["AP"] == results["segm"]["AP"] == pytest.approx(100)
    assert results["segm"]["AP-car"] != results["segm"]["AP-car"]  # NaN: nothing to find
    assert results["landmarks"]["contour_objects"] == 1


def test_crowds_and_masks_as_rle(coco):
    def change(annotation):
        mask = mask_util.decode(mask_util.frPyObjects(annotation["segmentation"], *tiny_coco.SIZE))
        rle = mask_util.encode(mask)[0]
        annotation["segmentation"] = {**rle, "counts": rle["counts"].decode()}
        if annotation["id"] == 2:
            pixels = mask[..., 0].ravel(order="F").tolist()
            first, inside = pixels.index(1), sum(pixels)
            assert inside == 24 * 20
            counts = [first, *[20, 28] * 23, 20]
            counts.append(len(pixels) - sum(counts))
            annotation.update(segmentation={"size": list(tiny_coco.SIZE), "counts": counts})
            annotation["iscrowd"] = 1

    change_annotations(coco, "val", change)
    outputs = [predictions(i, pred_contours=contour(i)) for i in (1, 2)]
    results = evaluate_tasks(coco, ("bbox", "segm"), *outputs)
    assert results["bbox"]["AP"] == results["segm"]["AP"] == pytest.approx(100)
    assert results["landmarks"]["contour_objects"] == 1
    assert results["landmarks"]["contour_px"] == pytest.approx(0, abs=1e-6)


def test_keypoints_of_some_classes(coco):
    change_annotations(coco, "val", add_keypoints)
    outputs = [predictions(i, pred_keypoints=keypoints(i)) for i in (1, 2)]
    tasks, sigmas = ("bbox", "keypoints"), [0.1] * 3
    results = evaluate_tasks(coco, tasks, *outputs, kpt_oks_sigmas=sigmas)
    assert results["keypoints"]["AP"] == results["keypoints"]["AP-person"] == pytest.approx(100)
    assert results["keypoints"]["AP-car"] != results["keypoints"]["AP-car"]  # NaN: no keypoints
    assert results["landmarks"]["keypoints_px"] == pytest.approx(0, abs=1e-6)
    assert results["landmarks"]["keypoints_objects"] == 1


def test_wrong_keypoints(coco):
    change_annotations(coco, "val", add_keypoints)
    # Both labelled keypoints are 4.2 pixels off. OKS is exp(-d^2 / (2 area (2 sigma)^2)) =
    # exp(-17.64 / 960 / 0.04) = 0.632: right at 0.5, 0.55 and 0.6. Cars do not matter.
    outputs = [
        predictions(1, pred_keypoints=keypoints(1, dx=4.2)),
        predictions(2, pred_keypoints=keypoints(2, dx=30.0)),
    ]
    results = evaluate_tasks(coco, ("keypoints",), *outputs, kpt_oks_sigmas=[0.1] * 3)
    assert results["keypoints"]["AP"] == pytest.approx(30)
    assert results["landmarks"]["keypoints_px"] == pytest.approx(4.2, abs=1e-5)
    size = (24 * 20) ** 0.5
    assert results["landmarks"]["keypoints_pct-person"] == pytest.approx(420 / size, abs=1e-4)


def test_predicted_keypoints_are_inferred(coco):
    # as of Detectron2's Keypoint R-CNN
    change_annotations(coco, "val", add_keypoints)
    DatasetCatalog.get("tiny_val")
    cfg = registered_cfg(coco, "TEST.KEYPOINT_OKS_SIGMAS", "(0.1, 0.1, 0.1)")
    results = run(
        build_evaluator(cfg, "tiny_val"),
        *(predictions(i, pred_keypoints=keypoints(i)) for i in (1, 2)),
    )
    assert list(results) == ["bbox", "keypoints", "landmarks"]
    assert results["keypoints"]["AP"] == pytest.approx(100)


def test_data_set_without_keypoints(coco):
    outputs = [predictions(i, pred_keypoints=keypoints(i)) for i in (1, 2)]
    results = evaluate_tasks(coco, ("bbox", "keypoints"), *outputs)
    assert list(results) == ["bbox", "landmarks"]
    assert results["landmarks"]["keypoints_objects"] == 0


def test_joint_model(coco):
    change_annotations(coco, "val", add_keypoints)
    points = torch.tensor([[[24.0, 10], [12, 20], [24, 30], [36, 20]]])
    outputs = [
        predictions(
            i,
            pred_extreme_points=points + torch.tensor([4.0 * (i - 1), 0]),
            pred_contours=contour(i),
            pred_keypoints=keypoints(i),
        )
        for i in (1, 2)
    ]
    tasks = ("bbox", "segm", "keypoints")
    results = evaluate_tasks(coco, tasks, *outputs, kpt_oks_sigmas=[0.1] * 3)
    assert [results[task]["AP"] for task in tasks] == pytest.approx([100, 100, 100])
    landmarks = results["landmarks"]
    assert landmarks["extreme_points_px"] == pytest.approx(0)
    assert landmarks["contour_objects"] == landmarks["extreme_points_objects"] == 2
    assert all(isinstance(value, float) for task in results.values() for value in task.values())
    print_csv_format(results)
    assert all("-" in key for key in landmarks if key.endswith(("person", "car")))


def test_a_subset_of_images(coco):
    DatasetCatalog.get("tiny_val")
    evaluator = LSNetEvaluator("tiny_val", tasks=("bbox", "segm"), output_dir=None)
    evaluator.reset()
    for i in (1, 2):
        evaluator.process(*([part] for part in predictions(i, pred_contours=contour(i, dx=i - 1))))
    for _ in range(2):  # the first time leaves the predictions as they were
        results = evaluator.evaluate(img_ids=[1])
        assert results["landmarks"]["contour_objects"] == 1
        assert results["segm"]["AP"] == pytest.approx(100)


def test_nothing_found(coco):
    empty = {"instances": predictions(1, pred_contours=contour(1))[1]["instances"][:0]}
    results = evaluate_tasks(coco, ("bbox", "segm"), ({"image_id": 1}, empty))
    assert results["segm"]["AP"] != results["segm"]["AP"]
    assert results["landmarks"]["contour_objects"] == 0
    assert json.loads((coco / "out" / "coco_instances_results.json").read_text()) == []


def test_where_sigmas_come_from(coco):
    cfg = registered_cfg(coco)
    assert oks_sigmas(cfg, "tiny_val") == ("COCO's defaults", COCO_OKS_SIGMAS)
    MetadataCatalog.get("tiny_val").keypoint_oks_sigmas = [0.1, 0.2, 0.3]
    assert oks_sigmas(cfg, "tiny_val")[1] == [0.1, 0.2, 0.3]
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.3, 0.2, 0.1]
    assert oks_sigmas(cfg, "tiny_val")[1] == [0.3, 0.2, 0.1]


def test_masks_and_poses_are_ranked_by_their_own_scores(coco):
    """Two detections of each object: a wrong one that the detection's score prefers, and a right
    one that its own score does."""
    change_annotations(coco, "val", add_keypoints)
    outputs = []
    for image_id in (1, 2):
        image, output = predictions(image_id)
        right = output["instances"]
        twice = Instances.cat([right, right])
        twice.scores = torch.tensor([0.9, 0.5])
        twice.pred_contours = torch.cat([contour(image_id, dx=30.0), contour(image_id)])
        twice.pred_keypoints = torch.cat([keypoints(image_id, dx=30.0), keypoints(image_id)])
        twice.contour_scores = twice.pose_scores = torch.tensor([0.2, 0.4])
        outputs.append((image, {"instances": twice}))
    tasks, sigmas = ("bbox", "segm", "keypoints"), [0.05, 0.05, 0.05]
    ranked = evaluate_tasks(coco, tasks, *outputs, kpt_oks_sigmas=sigmas)
    for _, output in outputs:
        output["instances"].remove("contour_scores")
        output["instances"].remove("pose_scores")
    by_detection = evaluate_tasks(coco, tasks, *outputs, kpt_oks_sigmas=sigmas)
    assert by_detection["bbox"]["AP"] == ranked["bbox"]["AP"] == pytest.approx(100)
    for task in ("segm", "keypoints"):
        assert ranked[task]["AP"] == pytest.approx(100)
        assert by_detection[task]["AP"] == pytest.approx(50)
    written = json.loads((coco / "out" / "coco_instances_results.json").read_text())
    assert [entry["score"] for entry in written[:2]] == pytest.approx([0.9, 0.5])

"""The whole model against the released code, from pixels to losses, gradients and detections."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from parity import DIRECTORY, Recorded, golden_weight, relative_difference

from lsnet_d2 import add_lsnet_config
from lsnet_d2.checkpoint import convert_lsnet_checkpoint, rename_released_key
from lsnet_d2.layers.pyramid_sampling import unflatten_levels
from lsnet_d2.modeling.points import make_anchor_points
from lsnet_d2.modeling.postprocessing import rescale_instances

CONFIGS = Path(__file__).parents[2] / "configs"
VARIANTS = {"ref": True, "fixed": False}  # prefix of the recorded arrays: REFERENCE_OFFSETS
LEVELS = range(3, 8)


def released_state_dict(case):
    names = json.loads((DIRECTORY / f"{case}.names.json").read_text())
    weights = {
        name: torch.from_numpy(golden_weight(name, shape))
        for name, shape in names["state_dict"].items()
    }
    for name, total in names["weight_abs_sum"].items():
        assert weights[name].double().abs().sum().item() == pytest.approx(total, abs=1e-3), name
    return weights, names


@pytest.fixture(scope="module")
def bbox_r50():
    return build_case("bbox_r50", "bbox", num_classes=80)


def build_case(case, task, num_classes):
    cfg = get_cfg()
    add_lsnet_config(cfg)
    cfg.merge_from_file(CONFIGS / "Base-LSNet.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.LSNET.TASK = task
    cfg.MODEL.LSNET.NUM_CLASSES = num_classes
    cfg.MODEL.LSNET.REFERENCE_OFFSETS = True
    model = build_model(cfg)
    weights, names = released_state_dict(case)
    missing, unexpected = model.load_state_dict(
        convert_lsnet_checkpoint(weights, cfg), strict=False
    )
    assert not unexpected and not missing
    return model, cfg, names


def read_inputs(case, run):
    """Model inputs with ground truth of a recorded run."""
    images, recorded = Recorded(f"images_{run}.npz"), Recorded(f"model_{case}_{run}.npz")
    inputs = []
    for i in range(2):
        image = images[f"img_{i}"].flip(-1).permute(2, 0, 1).contiguous()  # BGR to RGB, CHW
        instances = Instances(tuple(image.shape[1:]))
        instances.gt_boxes = Boxes(recorded[f"gt_boxes_{i}"])
        instances.gt_classes = recorded[f"gt_labels_{i}"]
        instances.gt_extreme_points = recorded[f"gt_extremes_{i}"].view(-1, 5, 2)[:, :4]
        inputs.append({"image": image, "instances": instances})
    return inputs, images, recorded


def run_model(model, inputs, reference_offsets):
    model.head.reference_offsets = reference_offsets
    images = model.preprocess_image(inputs)
    features = model.backbone(images.tensor)
    predictions = model.head([features[name] for name in model.head_in_features])
    points = make_anchor_points(predictions.sizes, model.strides, images.device)
    return images, features, predictions, points


def assert_map(actual, recorded, key, tolerance=1e-3):
    """Compare a map (B, C, H, W) at the positions that were stored."""
    expected = recorded[key]
    assert list(actual.shape[-2:]) == recorded[f"{key}.hw"].tolist(), key
    if f"{key}.pos" in recorded:
        actual = actual.flatten(2)[:, :, recorded[f"{key}.pos"].long()]
    difference = (actual - expected).abs().max().item()
    assert difference < tolerance, f"{key}: {difference}"


@pytest.mark.parametrize("run", ["even", "odd"])
def test_inputs_and_features(bbox_r50, run):
    model, _, _ = bbox_r50
    inputs, recorded_images, recorded = read_inputs("bbox_r50", run)
    model.eval()
    with torch.no_grad():
        images = model.preprocess_image(inputs)
        bottom_up = model.backbone.bottom_up(images.tensor)
        features = model.backbone(images.tensor)
    assert list(images.tensor.shape[-2:]) == recorded_images["batch_hw"].tolist()
    pixels = images.tensor.flatten(2)
    assert relative_difference(pixels.mean(2), recorded_images["input_mean"]) < 1e-5
    assert relative_difference(pixels.std(2), recorded_images["input_std"]) < 1e-5
    for i in (3, 4, 5):
        assert_map(bottom_up[f"res{i}"], recorded, f"c{i}")
    for level in LEVELS:
        assert_map(features[f"p{level}"], recorded, f"p{level}")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("run", ["even", "odd"])
def test_head_outputs(bbox_r50, run, variant):
    model, _, _ = bbox_r50
    inputs, _, recorded = read_inputs("bbox_r50", run)
    model.eval()
    with torch.no_grad():
        _, _, predictions, _ = run_model(model, inputs, VARIANTS[variant])
    sizes = predictions.sizes
    outputs = {f"{variant}.cls": unflatten_levels(predictions.logits, sizes)}
    for branch, init, refine in zip(
        model.branches, predictions.init, predictions.refine, strict=True
    ):
        outputs[f"ref.{branch.name}_init"] = unflatten_levels(init.flatten(2), sizes)
        outputs[f"{variant}.{branch.name}_refine"] = unflatten_levels(refine.flatten(2), sizes)
    for key, levels in outputs.items():
        for level, output in zip(LEVELS, levels, strict=True):
            assert_map(output, recorded, f"{key}_{level}")


@pytest.mark.parametrize("run", ["even", "odd", "empty1", "empty2"])
def test_assignments(bbox_r50, run):
    model, _, _ = bbox_r50
    inputs, _, recorded = read_inputs("bbox_r50", run)
    model.eval()
    with torch.no_grad():
        images, _, predictions, points = run_model(model, inputs, True)
    valid = torch.stack([model.valid_points(points, size) for size in images.image_sizes])
    targets = [model.branches[0].targets(x["instances"]) for x in inputs]
    branch = model.branches[0]
    boxes = branch.boxes(branch.decode(predictions.init[0], points.xy, points.strides))
    for stage, assigned in zip(
        ("init", "refine"), model.assign(points, predictions, targets, valid), strict=True
    ):
        for i in range(2):
            assert relative_difference(boxes[i], recorded[f"refine_proposals_{i}"]) < 1e-5
            expected = recorded[f"assign_{stage}_{i}"].long()
            assert torch.equal(valid[i], expected >= 0), (stage, i)
            assert torch.equal((assigned[i] + 1).masked_fill(~valid[i], -1), expected), (stage, i)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("run", ["even", "odd", "empty1", "empty2"])
def test_losses_and_gradients(bbox_r50, run, variant):
    model, cfg, names = bbox_r50
    inputs, _, recorded = read_inputs("bbox_r50", run)
    model.train()
    model.zero_grad()
    model.head.reference_offsets = VARIANTS[variant]
    with EventStorage():
        losses = model(inputs)
    for name, value in losses.items():
        expected = recorded[f"{variant}.{name}"].item()
        assert value.item() == pytest.approx(expected, rel=1e-4, abs=1e-7), name
    total = sum(losses.values())
    assert total.item() == pytest.approx(recorded[f"{variant}.loss_total"].item(), rel=1e-4)
    if variant != "ref":
        return

    total.backward()
    trainable = set(names["trainable"])
    ours = dict(model.named_parameters())
    renamed = {rename_released_key(name): name for name in names["parameters"]}
    expected_norms = dict(zip(names["parameters"], recorded["ref.grad_l2"].tolist(), strict=True))
    largest = max(n for n in expected_norms.values() if n == n)
    for our_name, name in renamed.items():
        parameter = ours.pop(our_name)
        assert parameter.requires_grad == (name in trainable), name
        norm = 0.0 if parameter.grad is None else parameter.grad.norm().item()
        expected = expected_norms[name]
        expected = 0.0 if expected != expected else expected  # NaN: no gradient
        assert norm == pytest.approx(expected, rel=1e-3, abs=1e-6 * largest), name
    assert not ours


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("run", ["even", "odd"])
def test_detections(bbox_r50, run, variant):
    model, _, _ = bbox_r50
    inputs, recorded_images, recorded = read_inputs("bbox_r50", run)
    model.eval()
    with torch.no_grad():
        images, _, predictions, points = run_model(model, inputs, VARIANTS[variant])
        results = model.inference(points, predictions, images)
    for i, result in enumerate(results):
        expected = recorded.under(f"{variant}.det_{i}")
        assert_detections(result, expected, expected["boxes"], expected["landmarks"])

        # In original pixels: the released code divides by the scale factor and does not clip anew.
        width, height = (
            torch.tensor(result.image_size[::-1]) / recorded_images["scale_factor"][i, :2]
        ).tolist()
        result.pred_boxes = Boxes(result.pred_boxes.tensor.clone())
        rescaled = rescale_instances(result, height, width, model.branches)
        expected = recorded.under(f"{variant}.det_rescaled_{i}")
        proper = Boxes(expected["boxes"]).nonempty()
        assert_detections(
            rescaled,
            {k: expected[k][proper] for k in ("scores", "labels")},
            expected["boxes"][proper],
            expected["landmarks"][proper],
        )


def assert_detections(result, expected, boxes, landmarks):
    """Detections agree one to one, but for two at most that near-ties at the cut may exchange."""
    assert len(result) == len(boxes)
    ours = torch.cat([result.pred_boxes.tensor, result.pred_extreme_points.flatten(1)], dim=1)
    theirs = torch.cat([boxes, landmarks], dim=1)
    equal = (ours[:, None] - theirs).abs().amax(dim=2) < 0.01  # pixels
    equal &= (result.scores[:, None] - expected["scores"]).abs() < 1e-4
    equal &= result.pred_classes[:, None] == expected["labels"]
    assert len(result) > 20
    assert equal.any(dim=1).sum() >= len(result) - 2
    assert equal.any(dim=0).sum() >= len(result) - 2

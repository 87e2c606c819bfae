import pytest
import torch
from benchmark_project import detectors, straight_port
from detectron2.utils.events import EventStorage
from tiny_model import make_input, tiny_model

from lsnet_d2.layers import ModulatedDeformConv, PyramidDeformConv

# Sizes whose maps are not halves of one another, and so small that the last level has one cell.
INPUTS = [
    make_input([[10, 12, 70, 80], [40, 30, 120, 90]], [0, 2], seed=1),
    make_input([[5, 5, 60, 50]], [1], size=(72, 100), seed=2),
]


def pair(**lsnet):
    """Our model and its port, with the same weights, which sample away from their cells."""
    models = [tiny_model(**lsnet) for _ in range(2)]
    for model in models:
        torch.manual_seed(1)
        detectors.scatter(model)
    return models[0], straight_port.straight_port(models[1])


BRANCHES = [{}, {"TASK": "segm"}, {"TASK": "joint", "BRANCHES": ["extreme", "keypoint"]}]


@pytest.mark.parametrize("lsnet", BRANCHES, ids=["extreme", "contour", "extreme and keypoint"])
@torch.no_grad()
def test_outputs_are_ours(lsnet):
    ours, port = pair(**lsnet)
    images = ours.preprocess_image(INPUTS)
    features = list(ours.backbone(images.tensor).values())
    expected, found = ours.head(features), port.head(features)
    assert found.sizes == expected.sizes
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    for stage in ("init", "refine"):
        for x, y in zip(getattr(found, stage), getattr(expected, stage), strict=True):
            assert y.std() > 0.1
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_detections_are_ours():
    ours, port = (model.eval() for model in pair())
    for model in (ours, port):
        model.test_score_thresh = 0.0
    for expected, found in zip(ours(INPUTS), port(INPUTS), strict=True):
        expected, found = expected["instances"], found["instances"]
        assert len(expected) == len(found) > 0
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lsnet", BRANCHES, ids=["extreme", "contour", "extreme and keypoint"])
def test_losses_and_gradients_are_ours(lsnet):
    losses, gradients = [], []
    for model in pair(**lsnet):
        with EventStorage():
            losses.append(model.train()(INPUTS))
        sum(losses[-1].values()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert losses[0].keys() == losses[1].keys()
    for name, loss in losses[0].items():
        torch.testing.assert_close(losses[1][name], loss, rtol=1e-4, atol=1e-6)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        difference = (gradients[1][name] - gradient).abs().max() / gradient.abs().max().clamp(1e-6)
        assert difference < 1e-3, name


def test_no_layer_of_ours_is_left():
    ours, port = pair()
    sampling = (ModulatedDeformConv, PyramidDeformConv)
    assert any(isinstance(module, sampling) for module in ours.modules())
    assert not any(isinstance(module, sampling) for module in port.modules())
    assert port.state_dict().keys() == ours.state_dict().keys()


@pytest.mark.parametrize("lsnet", [{"CPV": True}, {"REFERENCE_OFFSETS": True}])
def test_what_it_does_not_have_is_refused(lsnet):
    with pytest.raises(ValueError, match="corner verification nor"):
        straight_port.straight_port(tiny_model(**lsnet))

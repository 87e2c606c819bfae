import argparse

import pytest
import torch
from benchmark_project import detectors, inputs, measure
from tiny_coco import write_config
from tiny_model import tiny_model
from torch import nn


@pytest.fixture
def settings(tmp_path):
    write_config(tmp_path, "LSNet")
    config = tmp_path / "fixed.yaml"
    config.write_text('_BASE_: "tiny.yaml"\nMODEL: {RESNETS: {NORM: "FixedBN"}}\n')
    return argparse.Namespace(
        config_file=str(config),
        repeats=1,
        size=[64, 96],
        batch=2,
        train_size=[64, 64],
        train_batch=2,
        device="cpu",
        precision="float32",
    )


class TestDetectors:
    def test_as_many_candidates_as_asked_for(self, settings, monkeypatch):
        monkeypatch.setattr(detectors, "CANDIDATES", 50)
        (image,) = inputs.model_inputs(1, *settings.size)
        model = detectors.build("lsnet", settings.config_file, image)
        with torch.no_grad():
            images = model.preprocess_image([image])
            features = model.backbone(images.tensor)
            logits = model.head([features[name] for name in model.head_in_features]).logits
        assert (logits.sigmoid() > model.test_score_thresh).sum() == 50

    def test_landmarks_lie_around_their_points(self):
        model = tiny_model()
        detectors.scatter(model)
        (layers,) = model.head.branches.values()
        bias = layers.init_out.bias[: layers.vector_channels].unflatten(0, (-1, 4))
        # up, down, left, right of the top, left, bottom and right extreme point
        assert [row.argmax().item() for row in bias[:4]] == [0, 2, 1, 3]

    def test_no_more_detections_than_asked_for(self, settings, monkeypatch):
        monkeypatch.setattr(detectors, "DETECTIONS", 3)
        assert measure.inference("lsnet", settings)["detections"] == 3

    def test_statistics_are_those_of_the_image(self, settings):
        (image,) = inputs.model_inputs(1, *settings.size)
        model = detectors.build("lsnet", settings.config_file, image)
        outputs = []
        conv = model.backbone.bottom_up.stages[0][0].conv3  # whose output no ReLU cuts
        conv.register_forward_hook(lambda _module, _inputs, output: outputs.append(output.clone()))
        with torch.no_grad():
            model([image])
        assert outputs[0].mean().abs() < 1e-3
        assert abs(outputs[0].std().item() - 1) < 1e-2

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["retinanet", "fcos", "mask_rcnn", "keypoint_rcnn"])
    def test_detectron2s_models_train_and_detect(self, name, settings):
        assert measure.inference(name, settings)["detections"] > 0
        assert measure.training(name, settings)["train_step"] > 0


class TestInference:
    @pytest.mark.parametrize("name", ["lsnet", "lsnet_conv_tower", "straight_port"])
    def test_figures(self, name, settings):
        result = measure.inference(name, settings)
        assert result["inference"] > 0
        assert result["images_per_second"] > 0
        assert result["detections"] > 0
        stages = result["stages"]
        assert list(stages) == [
            *("backbone", "towers", "init", "sampling", "prediction", "postprocessing")
        ]
        assert min(stages.values()) > 0

    def test_stages_are_where_the_time_goes(self, monkeypatch):
        model = tiny_model().eval()
        slow = {
            "towers": model.head.cls_tower,
            "init": model.head.branches["bbox"].init_out,
            "sampling": model.head.cls_predictor.sample,
            "prediction": model.head.cls_predictor.out,
            "backbone": model.backbone,
        }
        images = inputs.model_inputs(1, 64, 64)
        for stage, module in slow.items():
            clock = [0.0]

            def work(*args, forward=module.forward, clock=clock):
                clock[0] += 1.0
                return forward(*args)

            monkeypatch.setattr(measure, "now", lambda _device, clock=clock: clock[0])
            monkeypatch.setattr(module, "forward", work)
            with torch.no_grad():
                times = measure.stages(model, images)
            monkeypatch.undo()
            spent = {name for name, seconds in times.items() if seconds > 0}
            assert spent == {stage}, times

    @pytest.mark.parametrize("device, batches", [("cpu", 1), ("cuda", 7)])
    def test_batches_are_repeated_where_they_are_fast(self, device, batches, monkeypatch):
        repeats = []
        monkeypatch.setattr(measure, "seconds", lambda _, count, __: repeats.append(count) or 0.5)
        images = [{}] * 4
        result = measure.timed_inference(
            lambda inputs: [{"instances": [1]}] * len(inputs), images, 7, torch.device(device)
        )
        assert repeats == [7, batches]
        assert result["images_per_second"] == 8


class TestTraining:
    def test_figures(self, settings):
        result = measure.training("lsnet", settings)
        assert result["train_step"] > 0
        assert result["train_memory"] > 1e6

    def test_a_loss_that_is_no_number_is_an_error(self, settings, monkeypatch):
        class Broken(nn.Linear):
            def forward(self, _):
                return {"loss": self.weight.sum() * float("nan")}

        monkeypatch.setattr(measure, "build", lambda *_, **__: Broken(1, 1))
        with pytest.raises(FloatingPointError, match="the loss is nan"):
            measure.training("lsnet", settings)


@pytest.mark.slow
def test_exported_models_are_timed(settings):
    settings.threads = 1
    result = measure.exported("lsnet", settings)
    assert result["onnx"] > 0 and result["pytorch"] > 0

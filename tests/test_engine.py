import json
import logging
import math

import pytest
import tiny_coco
import torch
from detectron2.data import MetadataCatalog
from detectron2.utils.env import seed_all_rng
from tiny_coco import change_annotations, registered_cfg

from lsnet_d2.checkpointer import LSNetCheckpointer
from lsnet_d2.data.annotation_checks import AnnotationError
from lsnet_d2.engine import LSNetTrainer, evaluate
from lsnet_d2.errors import (
    CheckpointError,
    ConfigError,
    UserError,
)
from lsnet_d2.modeling import LSNetWithTTA


@pytest.fixture(params=tiny_coco.CONFIGS)
def coco(tmp_path, request):
    with tiny_coco.registered(tmp_path, request.param):
        yield tmp_path


def tiny_trainer(folder, *opts, resume=False):
    trainer = LSNetTrainer(registered_cfg(folder, *opts))
    trainer.resume_or_load(resume=resume)
    return trainer


def test_training_leaves_what_users_expect(coco):
    trainer = tiny_trainer(coco)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.train()
    output = coco / "output"
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    assert sorted(p.name for p in output.glob("*.pth")) == [
        *(f"model_{i:07d}.pth" for i in range(3)),
        "model_final.pth",
    ]
    assert list(output.glob("events.out.tfevents.*"))
    rows = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    losses = {row["iteration"]: row["total_loss"] for row in rows if "total_loss" in row}
    assert list(losses) == [2] and math.isfinite(losses[2])
    saved = torch.load(output / "model_final.pth", weights_only=True)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(saved["model"][name], value)
    assert any(not torch.equal(before[k], v) for k, v in saved["model"].items())
    cfg = registered_cfg(coco, "MODEL.WEIGHTS", str(output / "model_final.pth"))
    results = evaluate(cfg)
    assert "AP" in results["bbox"]

    cfg.TEST.EXPECTED_RESULTS = [["bbox", "AP", 99.0, 0.1]]
    with pytest.raises(SystemExit):
        evaluate(cfg)


def test_no_validation_without_test_data(coco):
    tiny_trainer(coco, "DATASETS.TEST", "()", "TEST.VALIDATION_LOSS", "True").train()
    assert (coco / "output" / "model_final.pth").exists()


def test_evaluation_of_what_would_be_resumed(coco, monkeypatch):
    trainer = tiny_trainer(coco)
    trainer.train()
    loaded = []
    load = LSNetCheckpointer.load
    cfg = trainer.cfg.clone()

    def noted(self, path, *args, **kwargs):
        loaded.append(path)
        return load(self, path, *args, **kwargs)

    monkeypatch.setattr(LSNetCheckpointer, "load", noted)
    # A training may still be running there.
    being_written = coco / "output" / ".model_0000009.pth.partial"
    being_written.touch()
    evaluate(cfg, resume=True)
    assert being_written.exists()
    assert loaded == [str(coco / "output" / "model_final.pth")]

    cfg.defrost()
    cfg.OUTPUT_DIR = str(coco / "empty")
    with pytest.raises(CheckpointError, match="--resume: there is no checkpoint in .*empty"):
        evaluate(cfg, resume=True)


def test_training_resumes_after_damage(coco, caplog):
    trainer = tiny_trainer(coco)
    trainer.train()
    momentum = trainer.optimizer.state_dict()["state"]
    output = coco / "output"
    # The last two are damaged: one has gone, the other was cut short
    (output / "model_final.pth").unlink()
    content = (output / "model_0000002.pth").read_bytes()
    (output / "model_0000002.pth").write_bytes(content[: len(content) // 2])
    (output / ".model_0000003.pth.partial").write_bytes(b"cut")

    with caplog.at_level(logging.WARNING):
        trainer = tiny_trainer(coco, "SOLVER.MAX_ITER", "4", resume=True)
    assert trainer.start_iter == 2
    assert trainer.checkpointer.resumed_from.endswith("model_0000001.pth")
    assert "model_0000002.pth is missing or damaged" in caplog.text
    assert not (output / ".model_0000003.pth.partial").exists()
    saved = torch.load(output / "model_0000001.pth", weights_only=True)
    resumed = trainer.optimizer.state_dict()["state"]
    assert resumed.keys() == momentum.keys() and len(resumed) > 10
    kept = saved["trainer"]["_trainer"]["optimizer"]["state"]
    for key, state in resumed.items():
        assert torch.equal(state["momentum_buffer"], kept[key]["momentum_buffer"])
    trainer.train()
    final = torch.load(output / "model_final.pth", weights_only=True)
    assert final["iteration"] == 3


def test_a_run_that_ends_before_its_first_checkpoint_starts_again(coco):
    tiny_trainer(coco).train()
    tiny_trainer(coco)  # in the same folder, and killed
    trainer = tiny_trainer(coco, resume=True)
    assert trainer.start_iter == 0 and trainer.checkpointer.resumed_from is None
    trainer.train()
    assert tiny_trainer(coco, "SOLVER.MAX_ITER", "4", resume=True).start_iter == 3
    assert len(list(coco.glob("output/earlier_*/model_final.pth"))) == 1


def test_resume_with_another_batch_keeps_the_rate_and_says_so(coco, caplog):
    options = ("SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.BASE_LR", "0.01", "SOLVER.MAX_ITER", "1")
    tiny_trainer(coco, *options).train()
    tiny_trainer(coco, *options, resume=True)
    assert "learning rate of the checkpoint" not in caplog.text
    trainer = tiny_trainer(coco, *options, "SOLVER.BASE_LR", "0.005", resume=True)
    assert trainer.scheduler.base_lrs[0] == 0.01
    assert "rate of the checkpoint, 0.01, not with 0.005, that of the config" in caplog.text


def test_resume_without_checkpoint_starts_and_without_whole_one_fails(coco):
    trainer = tiny_trainer(coco, resume=True)
    assert trainer.start_iter == 0 and trainer.checkpointer.resumed_from is None
    (coco / "output" / "model_0000001.pth").write_bytes(b"PK cut short")
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        trainer.resume_or_load(resume=True)


def test_resume_from_weights_only_is_refused(coco):
    trainer = tiny_trainer(coco)
    LSNetCheckpointer(trainer.model, trainer.cfg.OUTPUT_DIR).save("model_0000005")
    with pytest.raises(CheckpointError, match="weights only"):
        trainer.resume_or_load(resume=True)


def test_resume_with_other_frozen_layers_is_refused(coco):
    tiny_trainer(coco).checkpointer.save("model_0000000", iteration=0)
    with pytest.raises(CheckpointError, match=r"model_0000000.pth: .*MODEL.BACKBONE.FREEZE_AT"):
        tiny_trainer(coco, "MODEL.BACKBONE.FREEZE_AT", "2", resume=True)


def test_batch_must_divide_among_processes(coco, monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 4)
    with pytest.raises(ConfigError, match="IMS_PER_BATCH is 2; .*processes, 4"):
        LSNetTrainer(registered_cfg(coco))


def test_batch_must_divide_into_its_parts(coco):
    with pytest.raises(
        ConfigError, match="IMS_PER_BATCH is 2; .*, 1, times .*ACCUMULATION_STEPS, 3"
    ):
        LSNetTrainer(registered_cfg(coco, "SOLVER.ACCUMULATION_STEPS", "3"))
    with pytest.raises(ConfigError, match="ACCUMULATION_STEPS is 0"):
        LSNetTrainer(registered_cfg(coco, "SOLVER.ACCUMULATION_STEPS", "0"))


def test_parts_of_a_batch_are_loaded_one_by_one(coco):
    trainer = tiny_trainer(coco, "SOLVER.ACCUMULATION_STEPS", "2", "SOLVER.MAX_ITER", "2")
    assert len(next(iter(trainer.data_loader))) == 1
    trainer.train()
    assert math.isfinite(last_loss(coco))


def last_loss(folder):
    lines = (folder / "output" / "metrics.json").read_text().splitlines()
    return [x["total_loss"] for x in map(json.loads, lines) if "total_loss" in x][-1]


@pytest.mark.parametrize("coco", ["LSNet"], indirect=True)
@pytest.mark.parametrize("precision", ["auto", "bfloat16"])
def test_mixed_precision_on_a_cpu(coco, precision):
    opts = ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", precision]
    trainer = tiny_trainer(coco, *opts, "SOLVER.MAX_ITER", "2")
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert math.isfinite(last_loss(coco))
    assert tiny_trainer(coco, *opts, resume=True).start_iter == 2


def test_unknown_precision(coco):
    opts = ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "float8"]
    with pytest.raises(ConfigError, match="AMP.PRECISION is 'float8'.*float16, bfloat16"):
        LSNetTrainer(registered_cfg(coco, *opts))


def test_validation_data_are_checked_before_training(coco):
    image = coco / "coco" / "val2017" / "000000000002.png"
    image.rename(coco / "elsewhere.png")
    with pytest.raises(AnnotationError, match=f"(?s)tiny_val.*no image file {image}"):
        LSNetTrainer(registered_cfg(coco))
    (coco / "elsewhere.png").rename(image)
    path = tiny_coco.json_file(coco, "val")
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UserError, match="tiny_val: .*val2017.json: not a complete JSON"):
        LSNetTrainer(registered_cfg(coco))


def test_validation_classes_are_checked_before_training(coco):
    with tiny_coco.edited(coco, "val") as dataset:
        dataset["categories"].pop()
    with pytest.raises(AnnotationError, match="tiny_val .*has 79 classes .*NUM_CLASSES is 80"):
        LSNetTrainer(registered_cfg(coco))


@pytest.mark.parametrize("coco", ["LSNet"], indirect=True)
def test_missing_sigmas_are_found_before_training(coco):
    change_annotations(
        coco, "val", lambda annotation: annotation.update(keypoints=[1, 1, 2] * 5, num_keypoints=5)
    )
    MetadataCatalog.get("tiny_train").set(keypoint_names=list("abcde"), keypoint_flip_map=[])
    options = ("MODEL.LSNET.TASK", "pose_bbox", "MODEL.LSNET.NUM_KEYPOINTS", "5")
    with pytest.raises(ConfigError, match="tiny_val has 5 keypoints, .*KEYPOINT_OKS_SIGMAS"):
        LSNetTrainer(registered_cfg(coco, *options))


@pytest.mark.parametrize("coco", ["LSNet"], indirect=True)
def test_last_evaluation_is_augmented_too(coco, monkeypatch):
    """One training: plain results every iteration, augmented ones in the end; and again later."""
    given, augment = set(), LSNetWithTTA.inference_single_image

    def spy(self, inputs):
        given.add(tuple(inputs["image"].shape[1:]))
        return augment(self, inputs)

    monkeypatch.setattr(LSNetWithTTA, "inference_single_image", spy)
    options = ("TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(48, 64)")
    options += (
        "INPUT.MIN_SIZE_TEST",
        "36",
        "TEST.EVAL_PERIOD",
        "1",
        "MODEL.LSNET.SCORE_THRESH_TEST",
        "0.0",
    )
    cfg = registered_cfg(coco, *options, "SOLVER.MAX_ITER", "2")
    seed_all_rng(0)
    trainer = LSNetTrainer(cfg)
    trainer.train()
    output = coco / "output"
    plain = json.loads((output / "inference" / "coco_instances_results.json").read_text())
    augmented = json.loads((output / "inference_TTA" / "coco_instances_results.json").read_text())
    assert augmented and augmented != plain
    rows = [json.loads(row) for row in (output / "metrics.json").read_text().splitlines()]
    assert "bbox/AP" in rows[-1] and "bbox_TTA/AP" in rows[-1]
    assert "bbox_TTA/AP" not in rows[0]
    assert trainer.model.training
    assert given == {tiny_coco.SIZE}  # resized by the augmentation alone

    cfg.MODEL.WEIGHTS = str(output / "model_final.pth")
    results = evaluate(cfg)
    assert {"bbox", "bbox_TTA"} <= results.keys()
    again = json.loads((output / "inference_TTA" / "coco_instances_results.json").read_text())
    assert again == augmented

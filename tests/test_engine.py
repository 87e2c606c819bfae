import json
import logging
import math
import os
import pickle
import signal
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import tiny_coco
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model
from torch import nn

from lsnet_d2.checkpointer import LSNetCheckpointer
from lsnet_d2.config_file import load_config, num_classes, resolve_device
from lsnet_d2.data.annotation_checks import AnnotationError
from lsnet_d2.engine import (
    LSNetTrainer,
    clip_whole_gradient,
    evaluate,
    load_training_data,
    reporting_data_errors,
)
from lsnet_d2.errors import (
    CheckpointError,
    ConfigError,
    UserError,
    did_you_mean,
    exit_on_user_error,
    one_line,
)
from lsnet_d2.files import atomic_write


@pytest.fixture(params=tiny_coco.CONFIGS)
def coco(tmp_path, request):
    """Folder with a small detector's config and data, registered as tiny_train and tiny_val."""
    tiny_coco.write_coco(tmp_path)
    tiny_coco.write_config(tmp_path, request.param)
    for split in tiny_coco.SPLITS:
        register_coco_instances(
            f"tiny_{split}",
            {},
            str(tiny_coco.json_file(tmp_path, split)),
            str(tmp_path / "coco" / f"{split}2017"),
        )
    yield tmp_path
    for split in tiny_coco.SPLITS:
        DatasetCatalog.remove(f"tiny_{split}")
        MetadataCatalog.remove(f"tiny_{split}")


def tiny_cfg(folder, *opts):
    return load_config(
        str(folder / "tiny.yaml"),
        # fmt: off
        [
            "MODEL.DEVICE",
            "cpu",
            "OUTPUT_DIR",
            str(folder / "output"),
            "DATASETS.TRAIN",
            "('tiny_train',)",
            "DATASETS.TEST",
            "('tiny_val',)",
            *opts,
        ],
        # fmt: on
    )


def tiny_trainer(folder, *opts, resume=False):
    trainer = LSNetTrainer(tiny_cfg(folder, *opts))
    trainer.resume_or_load(resume=resume)
    return trainer


# --- config


def test_device_is_what_there_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_device("auto") == "cpu"
    assert resolve_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="'cuda', but there is none"):
        resolve_device("cuda")
    with pytest.raises(ConfigError, match="MODEL.DEVICE is 'gpu'"):
        resolve_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == "cuda"
    assert resolve_device("cuda:1") == "cuda:1"
    with pytest.raises(ConfigError, match="'cuda:2', but there are 2 GPUs"):
        resolve_device("cuda:2")


def test_config_errors_name_key_and_file(tmp_path):
    def load(text, *opts):
        path = tmp_path / "some.yaml"
        path.write_text(text)
        return load_config(str(path), list(opts))

    with pytest.raises(ConfigError, match=r"some.yaml.*MODEL.LSNET.TAKS; did you.*LSNET.TASK"):
        load("MODEL: {LSNET: {TAKS: bbox}}\nVERSION: 2")
    with pytest.raises(ConfigError, match=r"some.yaml.*SOLVER.MAX_ITER"):
        load("SOLVER: {MAX_ITER: many}\nVERSION: 2")
    with pytest.raises(ConfigError, match=r"some.yaml: not a plain YAML"):
        load("SOLVER: {MAX_ITER: ")
    with pytest.raises(ConfigError, match=r"some.yaml: cannot read .*missing.yaml"):
        load("_BASE_: missing.yaml")
    with pytest.raises(ConfigError, match="no such config file: absent.yaml"):
        load_config("absent.yaml")
    with pytest.raises(ConfigError, match="SOLVER.BASELR; did you mean SOLVER.BASE_LR"):
        load("VERSION: 2", "SOLVER.BASELR", "1")
    with pytest.raises(ConfigError, match="pairs"):
        load("VERSION: 2", "SOLVER.BASE_LR=1")
    with pytest.raises(ConfigError, match="--eval-only must stand before"):
        load("VERSION: 2", "SOLVER.BASE_LR", "1", "--eval-only")
    with pytest.raises(ConfigError, match="TEST: data set 'coco_2017_vall' .*2017_val.*no folder"):
        load("VERSION: 2", "DATASETS.TEST", "('coco_2017_vall',)")
    with pytest.raises(ConfigError, match="CLIP_TYPE is 'all'; .*full_model"):
        load("SOLVER: {CLIP_GRADIENTS: {ENABLED: True, CLIP_TYPE: all}}\nVERSION: 2")
    with pytest.raises(ConfigError, match="AMP.ENABLED needs a CUDA device"):
        load("VERSION: 2", "SOLVER.AMP.ENABLED", "True", "MODEL.DEVICE", "cpu")
    with pytest.raises(ConfigError, match="MODEL.LSNET.TASK is 'boxes'"):
        load("MODEL: {META_ARCHITECTURE: LSNet, LSNET: {TASK: boxes}}\nVERSION: 2")
    with pytest.raises(ConfigError, match="META_ARCHITECTURE is 'LSNett'.*LSNet"):
        load("MODEL: {META_ARCHITECTURE: LSNett}\nVERSION: 2")


LSNET, RESNET, LITE = (
    {"MODEL.META_ARCHITECTURE": "LSNet", "MODEL.BACKBONE.NAME": name, "MODEL.DEVICE": "cpu"}
    for name in (
        "build_lsnet_resnet_fpn_backbone",
        "build_resnet_backbone",
        "build_lsnet_efficientnet_lite0_fpn_backbone",
    )
)


def options(settings):
    return [str(item) for pair in settings.items() for item in pair]


@pytest.mark.parametrize(
    ("base", "key", "value", "message"),
    [
        (LSNET, "MODEL.LSNET.TOWER_CONV", "dcnn", "'dcnn'; .*dcn, conv"),
        (LSNET, "MODEL.LSNET.IN_FEATURES", "['p3', 'p4']", "3 or more"),
        (LSNET, "MODEL.LSNET.CPV", "True", "does not have it"),
        (LSNET, "TEST.AUG.ENABLED", "True", "does not have it"),
        (LSNET, "MODEL.LSNET.NUM_CLASSES", "0", "1 or more"),
        (LSNET, "MODEL.BACKBONE.NAME", "build_lsnet_fpn_backbone", "did you mean .*build_lsnet"),
        (RESNET, "MODEL.BACKBONE.FREEZE_AT", "99", "0 to 5"),
        (RESNET, "SOLVER.IMS_PER_BATCH", "0", "1 or more"),
        (RESNET, "SOLVER.MAX_ITER", "0", "1 or more"),
        (RESNET, "SOLVER.LR_SCHEDULER_NAME", "Nope", "WarmupCosineLR"),
        (RESNET, "INPUT.FORMAT", "XYZ", "RGB, BGR"),
        (RESNET, "INPUT.RANDOM_FLIP", "sideways", "horizontal, vertical, none"),
    ],
)
def test_values_that_nothing_can_be_made_of(base, key, value, message):
    with pytest.raises(ConfigError, match=f"{key} is .*{message}"):
        load_config("", options({**base, key: value}))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.LSNET.IN_FEATURES", "['p3', 'p4', 'p9']", "^MODEL.LSNET.IN_FEATURES names 'p9'"),
        ("MODEL.FPN.OUT_CHANNELS", "48", "MODEL.FPN.OUT_CHANNELS.*got 48"),
        ("MODEL.BACKBONE.FREEZE_AT", "99", "MODEL.BACKBONE.FREEZE_AT is 99"),
        ("MODEL.EFFICIENTNET.NORM", "GN", "MODEL.EFFICIENTNET.NORM is 'GN'"),
    ],
)
def test_values_that_the_builders_refuse(key, value, message):
    fpn = {"MODEL.FPN.IN_FEATURES": "['stride8', 'stride16', 'stride32']"}
    cfg = load_config("", options({**LITE, **fpn, key: value}))
    with pytest.raises(ConfigError, match=message):
        LSNetTrainer.build_model(cfg)


SHIPPED = sorted((tiny_coco.ROOT / "configs").glob("**/*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configs_build_their_models(path):
    cfg = load_config(str(path), ["MODEL.DEVICE", "cpu"])
    if path.name == "Base-Shapes.yaml":
        return  # names no architecture
    model = LSNetTrainer.build_model(cfg)
    assert type(model).__name__ == cfg.MODEL.META_ARCHITECTURE
    assert model.num_classes == num_classes(cfg)


def test_config_file_is_data(tmp_path):
    path = tmp_path / "evil.yaml"
    target = tmp_path / "executed"
    path.write_text(f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{target}']\nVERSION: 2")
    with pytest.raises(ConfigError, match="evil.yaml"):
        load_config(str(path))
    assert not target.exists()


def test_number_of_classes_by_architecture(tmp_path):
    cfg = tiny_cfg_without_data(tmp_path, "MODEL.RETINANET.NUM_CLASSES", "7")
    assert num_classes(cfg) == 7
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.LSNET.NUM_CLASSES = "LSNet", 5
    assert num_classes(cfg) == 5
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.ROI_HEADS.NUM_CLASSES = "GeneralizedRCNN", 3
    assert num_classes(cfg) == 3


def tiny_cfg_without_data(folder, *opts):
    return load_config(
        str(tiny_coco.write_config(folder)),
        ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(folder / "output"), *opts],
    )


def test_user_errors_are_one_line_and_exit_2(capsys):
    @exit_on_user_error(KeyError)
    def main(error):
        raise error

    for error in (ConfigError("a\n b"), KeyError("x")):
        with pytest.raises(SystemExit) as exit_info:
            main(error)
        assert exit_info.value.code == 2
    assert capsys.readouterr().err == "error: a b\nerror: 'x'\n"
    with pytest.raises(ZeroDivisionError):
        main(ZeroDivisionError())
    worker = "Caught X in DataLoader worker process 0.\nOriginal Traceback (...):\n  f()\nm.X: a: b"
    assert one_line(UserError(worker)) == "a: b"
    assert did_you_mean("q", ["abc"]) == ""


# --- gradient clipping


@pytest.mark.parametrize("max_norm, factor", [(1.0, 1 / 5), (35.0, 1.0)])
def test_whole_gradient_is_clipped(max_norm, factor):
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    frozen = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b, frozen], "lr": 0.5}], lr=1.0)
    clip_whole_gradient(optimizer, max_norm)
    a.grad, b.grad = torch.tensor([0.0, 3.0]), torch.tensor([4.0])
    optimizer.step()
    torch.testing.assert_close(a.data, torch.tensor([0.0, -3 * factor]))
    torch.testing.assert_close(b.data, torch.tensor([-2 * factor]))


def test_optimizer_follows_the_clip_type(tmp_path):
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    steps = {}
    for clip_type in ("full_model", "norm"):
        cfg = tiny_cfg_without_data(
            tmp_path,
            # fmt: off
            "SOLVER.CLIP_GRADIENTS.CLIP_TYPE",
            clip_type,
            "SOLVER.CLIP_GRADIENTS.CLIP_VALUE",
            "1.0",
            "SOLVER.BASE_LR",
            "1.0",
            "SOLVER.WEIGHT_DECAY",
            "0.0",
            # fmt: on
        )
        optimizer = LSNetTrainer.build_optimizer(cfg, model)
        before = [p.detach().clone() for p in model.parameters()]
        for p, gradient in zip(model.parameters(), (3.0, 4.0), strict=True):
            p.grad = torch.full_like(p, gradient)
        optimizer.step()
        after = [p.detach() for p in model.parameters()]
        steps[clip_type] = [float(x - y) for x, y in zip(before, after, strict=True)]
    assert steps["full_model"] == pytest.approx([0.6, 0.8], rel=1e-4)
    assert steps["norm"] == pytest.approx([1.0, 1.0], rel=1e-4)


# --- training


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
    results = evaluate(tiny_cfg(coco, "MODEL.WEIGHTS", str(output / "model_final.pth")))
    assert "AP" in results["bbox"]


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
        LSNetTrainer(tiny_cfg(coco))


def test_data_errors_name_the_file(coco):
    cfg = tiny_cfg(coco)
    path = tiny_coco.json_file(coco, "train")
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match="tiny_train: .*train2017.json: not a complete JSON file"):
        load_training_data(cfg)
    dataset = json.loads(text)
    dataset["annotations"][2]["category_id"] = 12  # COCO has none
    path.write_text(json.dumps(dataset))
    message = "(?s)tiny_train: .*2017.json: .*annotation 3 of image 3: category 12 is not in the"
    with pytest.raises(UserError, match=message):
        load_training_data(cfg)
    path.unlink()
    with pytest.raises(UserError, match="tiny_train: .*_train2017.json: No such file"):
        load_training_data(cfg)
    cfg.DATASETS.TRAIN = ()
    with pytest.raises(ConfigError, match="DATASETS.TRAIN is empty"):
        load_training_data(cfg)


def test_data_errors_of_the_system_and_of_other_loaders():
    def message(error):
        with pytest.raises(UserError) as error_info, reporting_data_errors(["some"]):
            raise error
        return str(error_info.value)

    assert "some: /x: Not a directory" in message(NotADirectoryError(20, "Not a directory", "/x"))
    assert "some: /x: File exists" in message(FileExistsError(17, "File exists", "/x"))
    assert "some: no weights here (" in message(FileNotFoundError("no weights here"))
    assert message(KeyError("width")) == "data set some: KeyError: 'width'"
    with pytest.raises(AttributeError), reporting_data_errors(["some"]):  # a bug
        raise AttributeError


def change_annotations(folder, split, change):
    path = tiny_coco.json_file(folder, split)
    dataset = json.loads(path.read_text())
    for annotation in dataset["annotations"]:
        change(annotation)
    path.write_text(json.dumps(dataset))


def test_images_without_what_was_dropped_are_filtered(coco, caplog):
    def spoil(annotation):
        if annotation["id"] > 1:
            annotation["bbox"][2] = 0

    change_annotations(coco, "train", spoil)
    opts = ("DATASETS.INVALID_ANNOTATIONS", "drop")
    (record,) = load_training_data(tiny_cfg(coco, *opts))
    assert record["image_id"] == 1
    assert "annotation 2 of image" in caplog.text and "annotation 4 of image" in caplog.text
    keep = ("DATALOADER.FILTER_EMPTY_ANNOTATIONS", "False")
    assert len(load_training_data(tiny_cfg(coco, *opts, *keep))) == tiny_coco.SPLITS["train"]
    change_annotations(coco, "train", lambda annotation: annotation.update(bbox=[0, 0, 0, 0]))
    for more in ((), keep):
        with pytest.raises(UserError, match="tiny_train: no annotation is left"):
            load_training_data(tiny_cfg(coco, *opts, *more))


def test_validation_data_are_checked_before_training(coco):
    image = coco / "coco" / "val2017" / "000000000002.png"
    image.rename(coco / "elsewhere.png")
    with pytest.raises(AnnotationError, match=f"(?s)tiny_val.*no image file {image}"):
        LSNetTrainer(tiny_cfg(coco))
    (coco / "elsewhere.png").rename(image)
    path = tiny_coco.json_file(coco, "val")
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UserError, match="tiny_val: .*val2017.json: not a complete JSON"):
        LSNetTrainer(tiny_cfg(coco))


def test_validation_classes_are_checked_before_training(coco):
    path = tiny_coco.json_file(coco, "val")
    dataset = json.loads(path.read_text())
    dataset["categories"].pop()
    path.write_text(json.dumps(dataset))
    with pytest.raises(AnnotationError, match="tiny_val .*has 79 classes .*NUM_CLASSES is 80"):
        LSNetTrainer(tiny_cfg(coco))


@pytest.mark.parametrize("coco", ["LSNet"], indirect=True)
def test_missing_sigmas_are_found_before_training(coco):
    change_annotations(
        coco, "val", lambda annotation: annotation.update(keypoints=[1, 1, 2] * 5, num_keypoints=5)
    )
    MetadataCatalog.get("tiny_train").set(keypoint_names=list("abcde"), keypoint_flip_map=[])
    options = ("MODEL.LSNET.TASK", "pose_bbox", "MODEL.LSNET.NUM_KEYPOINTS", "5")
    with pytest.raises(ConfigError, match="tiny_val has 5 keypoints, .*KEYPOINT_OKS_SIGMAS"):
        LSNetTrainer(tiny_cfg(coco, *options))


# --- checkpoints


def test_atomic_write_survives_errors_and_kills(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path, "w") as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
    code = (
        "import os, signal, sys; from lsnet_d2.files import atomic_write\n"
        "with atomic_write(sys.argv[1], 'w') as f:\n"
        "    f.write('half'); f.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tiny_coco.ROOT)}
    result = subprocess.run([sys.executable, "-c", code, str(path)], env=env, check=False)
    assert result.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    with atomic_write(path, "w") as file:
        file.write("new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_save_that_fails_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    model = nn.Linear(2, 2)
    checkpointer = LSNetCheckpointer(model, str(tmp_path))
    checkpointer.save("model_0000001")

    def fill_the_disk(data, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(OSError, match="No space"):
        checkpointer.save("model_0000002")
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000001.pth"]
    assert checkpointer.find_checkpoint() == str(tmp_path / "model_0000001.pth")


def test_strict_loading_refuses_other_models(tmp_path):
    folder = str(tmp_path)
    cfg = tiny_cfg_without_data(tmp_path)
    model = build_model(cfg)
    LSNetCheckpointer(model, folder).save("model")
    path = str(tmp_path / "model.pth")
    LSNetCheckpointer(build_model(cfg)).load(path, strict=True)

    cfg.MODEL.RETINANET.NUM_CLASSES = 3
    other = build_model(cfg)
    message = r"model.pth is a checkpoint of another model: 2 have another shape \(head.cls_score"
    with pytest.raises(CheckpointError, match=message):
        LSNetCheckpointer(other).load(path, strict=True)
    LSNetCheckpointer(other).load(path)  # to train from it is fine
    weight = "backbone.bottom_up.stem.conv1.weight"
    assert torch.equal(other.state_dict()[weight], model.state_dict()[weight])

    cfg.MODEL.RETINANET.NUM_CONVS = 2
    with pytest.raises(CheckpointError, match=r"\d+ weights are missing \(head.*num.*classes"):
        LSNetCheckpointer(build_model(cfg)).load(path, strict=True)
    with pytest.raises(CheckpointError, match="none of the weights"):
        LSNetCheckpointer(nn.Linear(1, 1)).load(path)
    with pytest.raises(CheckpointError, match="MODEL.WEIGHTS is empty"):
        LSNetCheckpointer(nn.Linear(1, 1)).load("", strict=True)
    with pytest.raises(CheckpointError, match="no such file of weights: absent.pth"):
        LSNetCheckpointer(nn.Linear(1, 1)).load("absent.pth")


class _Execute:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
def test_weights_are_data(tmp_path, suffix):
    target, path = str(tmp_path / "executed"), str(tmp_path / f"evil.{suffix}")
    data = {"model": {"weight": _Execute(target)}, "__author__": "x"}
    if suffix == "pth":
        torch.save(data, path)
    else:
        with open(path, "wb") as file:
            pickle.dump(data, file)
    with pytest.raises(CheckpointError, match=f"cannot read the weights .*evil.{suffix}"):
        LSNetCheckpointer(nn.Linear(1, 1)).load(path)
    assert not os.path.exists(target)


@pytest.mark.parametrize("content", [b"", b"PK", b"not a checkpoint"])
def test_damaged_weights(tmp_path, content):
    path = tmp_path / "damaged.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot read the weights .*damaged.pth"):
        LSNetCheckpointer(nn.Linear(1, 1)).load(str(path))


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1], "holds a list, not named weights"),
        ({"model": [1, 2], "__author__": "x"}, "holds a list, not named weights"),
        ({"model": {"state_dict": 1}, "__author__": "x"}, "holds a int, not named weights"),
        ({"model": {1: 2}, "__author__": "x"}, "holds 1 where the name of a weight should be"),
        ({2: 1}, "holds 2 where the name of a weight should be"),
        ({"blobs": [1]}, ""),
        ({"model": {"weight": "text"}, "__author__": "x"}, "weight"),
    ],
)
def test_what_is_no_weights(tmp_path, suffix, data, message):
    path = tmp_path / f"other.{suffix}"
    if suffix == "pth":
        torch.save(data, path)
    else:
        path.write_bytes(pickle.dumps(data))
    with pytest.raises(CheckpointError, match=f"other.{suffix}.*{message}"):
        LSNetCheckpointer(nn.Linear(1, 1)).load(str(path))


def damage_everywhere(content):
    """Copies with a byte changed, or with the rest cut off, at many places."""
    step = max(len(content) // 150, 1)
    for place in [*range(0, len(content), step), *range(len(content) - 120, len(content), 3)]:
        yield content[:place] + bytes([content[place] ^ 0xE7]) + content[place + 1 :]
        yield content[:place]


def test_a_damaged_checkpoint_is_passed_over_wherever_it_is_damaged(tmp_path):
    model = nn.Linear(2, 2)
    checkpointer = LSNetCheckpointer(model, str(tmp_path))
    checkpointer.save("model_0000001", iteration=1)
    checkpointer.save("model_0000002", iteration=2)
    older, newest = (tmp_path / f"model_000000{i}.pth" for i in (1, 2))
    passed_over = 0
    for content in damage_everywhere(newest.read_bytes()):
        newest.write_bytes(content)
        rest = checkpointer.resume_or_load("", resume=True)
        passed_over += rest["iteration"] == 1
        assert checkpointer.resumed_from == str(older if rest["iteration"] == 1 else newest)
    assert passed_over > 200  # some bytes of an archive have no effect


def test_a_checkpoint_that_torch_refuses_is_passed_over(tmp_path, caplog):
    checkpointer = LSNetCheckpointer(nn.Linear(2, 2), str(tmp_path))
    checkpointer.save("model_0000001", iteration=1)
    checkpointer.save("model_0000002", iteration=2)
    with zipfile.ZipFile(tmp_path / "model_0000002.pth", "w") as archive:
        archive.writestr("model/data.pkl", "whole by its checksum")
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 1
    assert "model_0000002.pth is missing or damaged" in caplog.text


def test_an_error_of_the_main_process_is_raised_in_all(tmp_path, monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.is_main_process", lambda: False)
    error = CheckpointError("none of the checkpoints")
    monkeypatch.setattr("detectron2.utils.comm.all_gather", lambda mine: [(None, error), mine])
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        LSNetCheckpointer(nn.Linear(1, 1), str(tmp_path)).resume_or_load("", resume=True)


def saved_by_an_earlier_run(folder):
    """A folder with two checkpoints, and the model that they are of."""
    model = nn.Linear(2, 2)
    checkpointer = LSNetCheckpointer(model, str(folder))
    checkpointer.save("model_0000001", iteration=1)
    checkpointer.save("model_final", iteration=2)
    return model


def test_a_new_training_is_not_resumed_from_an_earlier_one(tmp_path, caplog):
    model = saved_by_an_earlier_run(tmp_path)
    content = (tmp_path / "model_final.pth").read_bytes()
    with caplog.at_level(logging.INFO):
        # its weights may be those of the earlier run
        LSNetCheckpointer(model, str(tmp_path)).resume_or_load(
            str(tmp_path / "model_final.pth"), resume=False
        )
    (earlier,) = tmp_path.glob("earlier_*")
    assert f"Moved the checkpoints of an earlier training to {earlier}" in caplog.text
    assert sorted(os.listdir(earlier)) == ["model_0000001.pth", "model_final.pth"]
    assert (earlier / "model_final.pth").read_bytes() == content
    # killed before its first checkpoint, it starts again; after it, it goes on
    checkpointer = LSNetCheckpointer(model, str(tmp_path))
    assert checkpointer.resume_or_load("", resume=True) == {}
    checkpointer.save("model_0000000", iteration=0)
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 0
    # a third run within the same second has a folder of its own
    checkpointer.resume_or_load("", resume=False)
    assert len(list(tmp_path.glob("earlier_*/*.pth"))) == 3


@pytest.mark.parametrize("moved", [0, 1])
def test_kill_while_checkpoints_are_moved(tmp_path, monkeypatch, moved):
    model = saved_by_an_earlier_run(tmp_path)
    left, replace = [moved], os.replace

    def kill(source, target):
        if str(target).endswith(".pth"):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        replace(source, target)

    monkeypatch.setattr(os, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        LSNetCheckpointer(model, str(tmp_path)).resume_or_load("", resume=False)
    monkeypatch.undo()
    assert len(list(tmp_path.glob("model_*.pth"))) == 2 - moved
    checkpointer = LSNetCheckpointer(model, str(tmp_path))
    assert checkpointer.resume_or_load("", resume=True) == {}
    assert checkpointer.resumed_from is None
    assert not list(tmp_path.glob("model_*.pth"))


def test_only_the_main_process_moves_checkpoints(tmp_path):
    model = saved_by_an_earlier_run(tmp_path)
    LSNetCheckpointer(model, str(tmp_path), save_to_disk=False).resume_or_load("", resume=False)
    assert sorted(os.listdir(tmp_path)) == [
        "last_checkpoint",
        "model_0000001.pth",
        "model_final.pth",
    ]


def test_model_zoo_pickle_loads(tmp_path):
    path = tmp_path / "zoo.pkl"
    weights = {"weight": np.array([[2.0]], np.float32), "bias": np.array([3.0], np.float32)}
    with open(path, "wb") as file:
        pickle.dump({"model": weights, "__author__": "x"}, file)
    model = nn.Linear(1, 1)
    LSNetCheckpointer(model).load(str(path), strict=True)
    assert model.weight.item() == 2.0 and model.bias.item() == 3.0

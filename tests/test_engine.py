import json
import logging
import math
import os
import pickle
import re
import signal
import subprocess
import sys

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
from lsnet_d2.engine import LSNetTrainer, clip_whole_gradient, evaluate, load_training_data
from lsnet_d2.errors import (
    CheckpointError,
    ConfigError,
    UserError,
    did_you_mean,
    exit_on_user_error,
    one_line,
)
from lsnet_d2.files import atomic_write


@pytest.fixture
def coco(tmp_path):
    """Folder with the small data set, registered as tiny_train and tiny_val."""
    tiny_coco.write_coco(tmp_path)
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
        str(tiny_coco.write_config(folder)),
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
    with pytest.raises(ConfigError, match="DATASETS.TEST: data set 'coco_2017_vall' .*2017_val"):
        load("VERSION: 2", "DATASETS.TEST", "('coco_2017_vall',)")
    with pytest.raises(ConfigError, match="CLIP_TYPE is 'all'; .*full_model"):
        load("SOLVER: {CLIP_GRADIENTS: {ENABLED: True, CLIP_TYPE: all}}\nVERSION: 2")
    with pytest.raises(ConfigError, match="AMP.ENABLED needs a CUDA device"):
        load("VERSION: 2", "SOLVER.AMP.ENABLED", "True", "MODEL.DEVICE", "cpu")
    with pytest.raises(ConfigError, match="MODEL.LSNET.TASK is 'boxes'"):
        load("MODEL: {META_ARCHITECTURE: LSNet, LSNET: {TASK: boxes}}\nVERSION: 2")
    with pytest.raises(ConfigError, match="META_ARCHITECTURE is 'LSNett'.*LSNet"):
        load("MODEL: {META_ARCHITECTURE: LSNett}\nVERSION: 2")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SOLVER.IMS_PER_BATCH", "0"),
        ("SOLVER.MAX_ITER", "0"),
        ("SOLVER.LR_SCHEDULER_NAME", "Nope"),
        ("INPUT.FORMAT", "XYZ"),
        ("INPUT.RANDOM_FLIP", "sideways"),
        ("INPUT.CONTOUR_SAMPLING", "even"),
        ("MODEL.BACKBONE.NAME", "nope"),
        ("MODEL.LSNET.TOWER_CONV", "dcnn"),
        ("MODEL.LSNET.IN_FEATURES", "['p3', 'p4']"),
        ("MODEL.LSNET.CPV", "True"),
        ("TEST.AUG.ENABLED", "True"),
    ],
)
def test_values_that_could_only_fail_later_are_refused(key, value):
    config = str(tiny_coco.ROOT / "configs/bbox/lsnet_R_50_FPN_1x.yaml")
    with pytest.raises(ConfigError, match=f"^{re.escape(key)} is "):
        load_config(config, [key, value])


def test_models_that_cannot_be_built_are_config_errors():
    config = str(tiny_coco.ROOT / "configs/bbox/lsnet_R_50_FPN_1x.yaml")
    for opts in (
        ["MODEL.FPN.OUT_CHANNELS", "48"],
        ["MODEL.LSNET.IN_FEATURES", "['p3', 'p4', 'p9']"],
        ["MODEL.RESNETS.DEPTH", "51"],
    ):
        with pytest.raises(ConfigError, match="LSNet cannot be built"):
            LSNetTrainer.build_model(load_config(config, opts))


CONFIGS = sorted((tiny_coco.ROOT / "configs").glob("*/*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_configs_load(path):
    cfg = load_config(str(path))
    assert cfg.OUTPUT_DIR.startswith("./output") or cfg.OUTPUT_DIR.startswith("output/")
    assert cfg.SOLVER.STEPS[-1] < cfg.SOLVER.MAX_ITER or "Cosine" in cfg.SOLVER.LR_SCHEDULER_NAME


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


def test_resume_without_checkpoint_starts_and_without_whole_one_fails(coco):
    trainer = tiny_trainer(coco, resume=True)
    assert trainer.start_iter == 0 and trainer.checkpointer.resumed_from is None
    (coco / "output" / "model_0000001.pth").write_bytes(b"PK cut short")
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        trainer.resume_or_load(resume=True)


def test_a_new_training_sets_older_checkpoints_aside(coco, caplog):
    tiny_trainer(coco).train()
    output = coco / "output"
    before = {p.name: p.read_bytes() for p in output.glob("*.pth")}
    with caplog.at_level(logging.WARNING):
        tiny_trainer(coco)
    assert not list(output.glob("*.pth")) and not (output / "last_checkpoint").exists()
    assert {p.name: p.read_bytes() for p in (output / "earlier_1").glob("*.pth")} == before
    assert "earlier_1" in caplog.text
    # killed before its first checkpoint, it starts anew and does not go on from the older one
    assert tiny_trainer(coco, resume=True).start_iter == 0


def test_weights_may_be_those_of_an_earlier_training_in_the_same_folder(coco):
    tiny_trainer(coco).train()
    weights = coco / "output" / "model_final.pth"
    saved = torch.load(weights, weights_only=True)["model"]
    trainer = tiny_trainer(coco, "MODEL.WEIGHTS", str(weights))
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(saved[name], value)


def test_resume_with_other_parameters_is_explained(coco):
    tiny_trainer(coco, "SOLVER.MAX_ITER", "1").train()
    with pytest.raises(CheckpointError, match=r"model_final.pth does not fit.*FREEZE_AT"):
        tiny_trainer(coco, "MODEL.BACKBONE.FREEZE_AT", "3", resume=True)


def test_test_data_are_checked_before_training(coco):
    path = tiny_coco.json_file(coco, "val")
    text = path.read_text()
    dataset = json.loads(text)
    dataset["annotations"][0]["bbox"] = [1, 2, 3]
    path.write_text(json.dumps(dataset))
    with pytest.raises(UserError, match=r"instances_val2017.json: annotation 1: its box"):
        LSNetTrainer(tiny_cfg(coco))
    path.write_text(text)
    image = next((coco / "coco" / "val2017").iterdir())
    image.unlink()
    with pytest.raises(UserError, match=f"no image file .*{image.name}"):
        LSNetTrainer(tiny_cfg(coco))


def test_resume_from_weights_only_is_refused(coco):
    trainer = tiny_trainer(coco)
    LSNetCheckpointer(trainer.model, trainer.cfg.OUTPUT_DIR).save("model_0000005")
    with pytest.raises(CheckpointError, match="weights only"):
        trainer.resume_or_load(resume=True)


def test_batch_must_divide_among_processes(coco, monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 4)
    with pytest.raises(ConfigError, match="IMS_PER_BATCH is 2; .*processes, 4"):
        LSNetTrainer(tiny_cfg(coco))


def test_data_errors_name_the_file(coco):
    cfg = tiny_cfg(coco)
    path = tiny_coco.json_file(coco, "train")
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(
        UserError, match=r"tiny_train \(.*json\): the annotation file is not complete"
    ):
        load_training_data(cfg)
    dataset = json.loads(text)
    dataset["annotations"][2]["category_id"] = 12  # COCO has none
    path.write_text(json.dumps(dataset))
    with pytest.raises(UserError, match=r"tiny_train \(.*json\): Encountered category_id=12"):
        load_training_data(cfg)
    path.unlink()
    with pytest.raises(
        UserError, match=r"tiny_train \(.*json\): no such file: .*instances_train2017.json"
    ):
        load_training_data(cfg)
    cfg.DATASETS.TRAIN = ()
    with pytest.raises(ConfigError, match="DATASETS.TRAIN is empty"):
        load_training_data(cfg)


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


@pytest.mark.parametrize("model", [[1, 2], torch.zeros(2), {1: torch.zeros(2)}])
def test_weights_must_have_names(tmp_path, model):
    path = tmp_path / "unnamed.pth"
    torch.save({"model": model}, path)
    with pytest.raises(CheckpointError, match=r"unnamed.pth does not hold weights by their names"):
        LSNetCheckpointer(nn.Linear(1, 1)).load(str(path))


def test_a_checkpoint_with_flipped_bytes_is_passed_over(tmp_path):
    checkpointer = LSNetCheckpointer(nn.Linear(1, 1), str(tmp_path))
    checkpointer.save("model_0000001")
    checkpointer.save("model_0000002")
    last = tmp_path / "model_0000002.pth"
    whole = last.read_bytes()
    generator = np.random.default_rng(0)
    damaged = 0
    for _ in range(100):
        content = bytearray(whole)
        for index in generator.integers(len(content), size=4):
            content[index] ^= generator.integers(1, 256)
        last.write_bytes(content)
        found = checkpointer.find_checkpoint()
        damaged += found.endswith("1.pth")
        torch.load(found, weights_only=True)  # what it found can be read
    assert damaged > 50


@pytest.mark.parametrize("content", [b"", b"PK", b"not a checkpoint"])
def test_damaged_weights(tmp_path, content):
    path = tmp_path / "damaged.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot read the weights .*damaged.pth"):
        LSNetCheckpointer(nn.Linear(1, 1)).load(str(path))


def test_model_zoo_pickle_loads(tmp_path):
    path = tmp_path / "zoo.pkl"
    weights = {"weight": np.array([[2.0]], np.float32), "bias": np.array([3.0], np.float32)}
    with open(path, "wb") as file:
        pickle.dump({"model": weights, "__author__": "x"}, file)
    model = nn.Linear(1, 1)
    LSNetCheckpointer(model).load(str(path), strict=True)
    assert model.weight.item() == 2.0 and model.bias.item() == 3.0

import hashlib
import io
import logging
import os
import pickle
import zipfile

import numpy as np
import pytest
import tiny_coco
import torch
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from torch import nn

from lsnet_d2.checkpointer import LSNetCheckpointer, read_weights
from lsnet_d2.engine import evaluate
from lsnet_d2.errors import CheckpointError
from lsnet_d2.loaders import check_proposals, load_training_data


def test_save_that_fails_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    model = nn.Linear(2, 2)
    checkpointer = LSNetCheckpointer(model, str(tmp_path))
    checkpointer.save("model_0000001")

    def fill_the_disk(data, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(CheckpointError, match=r"cannot write .*model_0000002.pth: No space left"):
        checkpointer.save("model_0000002")
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000001.pth"]
    assert checkpointer.find_checkpoint() == str(tmp_path / "model_0000001.pth")


def test_strict_loading_refuses_other_models(tmp_path):
    folder = str(tmp_path)
    cfg = tiny_coco.load_tiny_config(tmp_path)
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


def test_interruption_of_a_save(tmp_path, monkeypatch):
    """In a write, torch makes another error of it."""
    checkpointer = LSNetCheckpointer(nn.Linear(1, 1), str(tmp_path))
    checkpointer.save("model_0000001", iteration=1)
    calls = []

    class Interrupted(io.BytesIO):
        def write(self, data):
            calls.append(data)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return super().write(data)

    with monkeypatch.context() as patch:
        patch.setattr("lsnet_d2.files.open", lambda *_, **__: Interrupted(), raising=False)
        with pytest.raises(KeyboardInterrupt):
            checkpointer.save("model_0000002", iteration=2)
    assert len(calls) == 3
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000001.pth"]


@pytest.mark.parametrize("suffix", ["pth", "pyth", "pkl"])
@pytest.mark.parametrize("old_format", [False, True])
def test_weights_are_data(tmp_path, suffix, old_format):
    target, path = str(tmp_path / "executed"), str(tmp_path / f"evil.{suffix}")
    data = {"model": {"weight": _Execute(target)}, "model_state": {}, "__author__": "x"}
    if suffix == "pkl":
        with open(path, "wb") as file:
            pickle.dump(data, file, protocol=2 if old_format else 4)
    else:
        torch.save(data, path, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(CheckpointError, match=f"cannot read the weights .*evil.{suffix}"):
        LSNetCheckpointer(nn.Linear(1, 1)).load(path)
    assert not os.path.exists(target)


def test_proposals_are_data(tmp_path):
    target = str(tmp_path / "executed")
    cfg = tiny_coco.load_tiny_config(tmp_path)
    cfg.MODEL.LOAD_PROPOSALS = True
    for key, data in (("TRAIN", _Execute(target)), ("TEST", {"ids": [_Execute(target)]})):
        path = tmp_path / f"{key}.pkl"
        path.write_bytes(pickle.dumps(data))
        cfg.DATASETS.PROPOSAL_FILES_TRAIN = cfg.DATASETS.PROPOSAL_FILES_TEST = ()
        cfg.DATASETS[f"PROPOSAL_FILES_{key}"] = (str(path),)
        for check in (check_proposals, load_training_data, evaluate):
            with pytest.raises(CheckpointError, match=rf"{key}.pkl .*mkdir is not allowed"):
                check(cfg)
    assert not os.path.exists(target)
    path.write_bytes(pickle.dumps({"ids": [1], "boxes": [np.ones((1, 4))], "bbox_mode": 1}))
    check_proposals(cfg)


def test_weights_of_pycls(tmp_path):
    torch.save({"model_state": {"weight": torch.full((1, 1), 2.0)}}, tmp_path / "w.pyth")
    model = nn.Linear(1, 1)
    LSNetCheckpointer(model).load(str(tmp_path / "w.pyth"))
    assert model.weight.item() == 2
    torch.save({"weight": torch.ones(1)}, tmp_path / "w.pyth")
    with pytest.raises(CheckpointError, match="model_state"):
        LSNetCheckpointer(model).load(str(tmp_path / "w.pyth"))


def test_downloads_are_what_their_name_says(tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    torch.save({"weight": torch.full((1, 1), 2.0), "bias": torch.zeros(1)}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(PathManager, "get_local_path", lambda *_, **__: str(path))
    model = nn.Linear(1, 1)
    LSNetCheckpointer(model).load(f"https://example.com/net-{digest[:8]}.pth")
    assert model.weight.item() == 2
    LSNetCheckpointer(model).load("https://example.com/net.pth")
    other = "0" * 8 if digest[:8] != "0" * 8 else "1" * 8
    with pytest.raises(CheckpointError, match=f"net-{other}.pth: what .*SHA-256 {digest}"):
        LSNetCheckpointer(model).load(f"https://example.com/net-{other}.pth")


@pytest.mark.parametrize("content", [b"", b"PK", b"not a checkpoint"])
def test_damaged_weights(tmp_path, content):
    path = tmp_path / "damaged.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot read the weights .*damaged.pth"):
        LSNetCheckpointer(nn.Linear(1, 1)).load(str(path))


def test_a_changed_number_is_damage(tmp_path):
    """Torch reads such a file without a word."""
    path = tmp_path / "damaged.pth"
    torch.save({"weight": torch.full((50, 50), 0.5)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((2,), 0.5).numpy().tobytes())] ^= 0xFF
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["weight"][0, 0] != 0.5
    for read in (LSNetCheckpointer(nn.Linear(50, 50)).load, read_weights):
        with pytest.raises(CheckpointError, match=r"damaged\.pth is damaged: .*data/0 is wrong"):
            read(str(path))


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
    assert not (tmp_path / "last_checkpoint").exists()
    # killed before its first checkpoint, it starts again; after it, it goes on
    checkpointer = LSNetCheckpointer(model, str(tmp_path))
    assert checkpointer.resume_or_load("", resume=True) == {}
    checkpointer.save("model_0000000", iteration=0)
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 0
    # a third run within the same second has a folder of its own
    checkpointer.resume_or_load("", resume=False)
    assert len(list(tmp_path.glob("earlier_*/*.pth"))) == 3
    # the best so far is gone on from if there is no other, as in a new folder
    checkpointer.save("model_best", iteration=4, as_last=False)
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 4


def test_kill_after_checkpoints_are_moved(tmp_path):
    """But before the note of it was removed."""
    LSNetCheckpointer(nn.Identity(), str(tmp_path)).tag_last_checkpoint("")
    checkpointer = LSNetCheckpointer(nn.Linear(2, 2), str(tmp_path))
    assert checkpointer.resume_or_load("", resume=True) == {}
    assert not (tmp_path / "last_checkpoint").exists()


def test_a_checkpointer_without_a_folder_moves_nothing(tmp_path, monkeypatch):
    model = saved_by_an_earlier_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    LSNetCheckpointer(model).resume_or_load("", resume=False)
    assert len(list(tmp_path.glob("model_*.pth"))) == 2


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
    assert not (tmp_path / "last_checkpoint").exists()


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

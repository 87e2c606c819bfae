import io
import logging
import os
import zipfile

import pytest
import tiny_coco
import torch
from detectron2.modeling import build_model
from torch import nn

from lsnet_d2.checkpointer import LSNetCheckpointer
from lsnet_d2.errors import CheckpointError


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


def test_options_behind_a_path(tmp_path):
    path = tmp_path / "backbone.pth"
    torch.save({"weight": torch.full((1, 1), 2.0), "bias": torch.zeros(1)}, path)
    model = nn.ModuleDict({"inner": nn.Linear(1, 1)})
    LSNetCheckpointer(model).load(f"{path}?matching_heuristics=True", strict=True)
    assert model["inner"].weight.item() == 2
    with pytest.raises(CheckpointError, match=r"backbone.pth .*heuristics': \['maybe'\]"):
        LSNetCheckpointer(model).load(f"{path}?other_heuristics=maybe")


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

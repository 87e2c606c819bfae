import hashlib
import os
import pickle

import numpy as np
import pytest
import tiny_coco
import torch
from detectron2.utils.file_io import PathManager
from torch import nn

from lsnet_d2.checkpointer import LSNetCheckpointer
from lsnet_d2.engine import evaluate
from lsnet_d2.errors import CheckpointError
from lsnet_d2.loaders import check_proposals, load_training_data
from lsnet_d2.weight_files import (
    read_model_zoo_pickle,
    read_pycls_file,
    read_torch_file,
    read_weights,
)

READERS = {"pth": read_torch_file, "pyth": read_pycls_file, "pkl": read_model_zoo_pickle}


class _Execute:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


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
    for read in (READERS[suffix], LSNetCheckpointer(nn.Linear(1, 1)).load):
        with pytest.raises(CheckpointError, match=f"cannot read the weights .*evil.{suffix}"):
            read(path)
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
    torch.save({"model_state": {1: torch.ones(1)}}, tmp_path / "w.pyth")
    with pytest.raises(CheckpointError, match=r"cannot read the weights .*w\.pyth"):
        LSNetCheckpointer(model).load(str(tmp_path / "w.pyth"))


def test_downloads_are_what_their_name_says(tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    torch.save({"weight": torch.full((1, 1), 2.0), "bias": torch.zeros(1)}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(PathManager, "get_local_path", lambda *_, **__: str(path))
    model = nn.Linear(1, 1)
    LSNetCheckpointer(model).load(f"https://example.com/net-{digest[:8]}.pth")
    assert model.weight.item() == 2
    for name in ("net.pth", "net-20261128.pth"):  # a date is no digest
        LSNetCheckpointer(model).load(f"https://example.com/{name}")
    other = "0" * 8 if digest[:8] != "0" * 8 else "1" * 8
    with pytest.raises(CheckpointError, match=f"net-{other}.pth: what .*SHA-256 {digest}"):
        LSNetCheckpointer(model).load(f"https://example.com/net-{other}.pth")


@pytest.mark.parametrize("suffix", READERS)
@pytest.mark.parametrize("content", [b"", b"PK", b"not a checkpoint"])
def test_damaged_weights(tmp_path, suffix, content):
    path = tmp_path / f"damaged.{suffix}"
    path.write_bytes(content)
    for read in (READERS[suffix], LSNetCheckpointer(nn.Linear(1, 1)).load):
        with pytest.raises(CheckpointError, match=f"cannot read the weights .*damaged.{suffix}"):
            read(str(path))


@pytest.mark.parametrize("suffix", ["pth", "pyth"])
def test_a_changed_number_is_damage(tmp_path, suffix):
    """Torch reads such a file without a word."""
    path = tmp_path / f"damaged.{suffix}"
    torch.save({"model_state": {"weight": torch.full((50, 50), 0.5)}}, path)
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((2,), 0.5).numpy().tobytes())] ^= 0xFF
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["model_state"]["weight"][0, 0] != 0.5
    for read in (READERS[suffix], read_weights, LSNetCheckpointer(nn.Linear(50, 50)).load):
        with pytest.raises(CheckpointError, match=rf"\.{suffix} is damaged: .*data/0 is wrong"):
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


def test_model_zoo_pickle_loads(tmp_path):
    path = tmp_path / "zoo.pkl"
    weights = {"weight": np.array([[2.0]], np.float32), "bias": np.array([3.0], np.float32)}
    with open(path, "wb") as file:
        pickle.dump({"model": weights, "__author__": "x"}, file)
    model = nn.Linear(1, 1)
    LSNetCheckpointer(model).load(str(path), strict=True)
    assert model.weight.item() == 2.0 and model.bias.item() == 3.0


@pytest.mark.parametrize("of_detector", [False, True])
def test_pickle_of_caffe2(tmp_path, of_detector):
    path = tmp_path / "caffe2.pkl"
    weights = {"conv1_w": np.ones(2, np.float32), "conv1_w_momentum": np.zeros(2, np.float32)}
    path.write_bytes(pickle.dumps({"blobs": weights} if of_detector else weights))
    read = read_model_zoo_pickle(str(path))
    assert read.pop("model") == {"conv1_w": pytest.approx(1)}
    assert read == {"__author__": "Caffe2", "matching_heuristics": True}

"""Files of weights, read as data: nothing in them is executed."""

import hashlib
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from .errors import CheckpointError

logger = logging.getLogger(__name__)

_DATE = re.compile(r"(19|20)\d\d(0\d|1[0-2])([0-2]\d|3[01])")  # in a name, no digest


def read_weights(path: str) -> Mapping[str, Any]:
    """The weights in a file of ``torch.save``, by the names they have there.

    Raises:
        CheckpointError: the file is missing, damaged, or holds more than plain data.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"no such file of weights: {path}")
    return named_weights(path, read_torch_file(path))


def named_weights(path: str, data: Mapping[str, Any]) -> Mapping[str, Any]:
    """The weights, out of what stands beside them: Detectron2 saves them as "model", mmdetection
    as "state_dict".

    Args:
        path: what ``data`` was read from, for messages.

    Raises:
        CheckpointError: what stands there is no mapping from strings.
    """
    for key in ("model", "state_dict"):
        if key in data:
            data = _require_names(path, data[key])
    return data


def read_torch_file(path: str) -> Mapping[str, Any]:
    """What a file of ``torch.save`` holds, on the CPU.

    Raises:
        CheckpointError: it is damaged, holds more than plain data, or is no mapping from names.
    """
    with as_checkpoint_error(path):
        # torch does not look at the checksums of an archive; it reads a damaged tensor as it is
        if zipfile.is_zipfile(path) and (damaged := _first_damaged(path)):
            raise CheckpointError(f"{path} is damaged: the checksum of {damaged} is wrong")
        return _require_names(path, torch.load(path, map_location="cpu", weights_only=True))


def map_torch_file(path: str) -> Mapping[str, Any]:
    """As :func:`read_torch_file`, for what stands beside the weights: these stay on the disk, and
    their checksums are not looked at."""
    with as_checkpoint_error(path):
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return _require_names(path, data)


def read_model_zoo_pickle(path: str) -> dict[str, Any]:
    """The weights in a pickle, in the form that Detectron2 gives them: its own zoo names its
    author; others are Caffe2's and matched by heuristics.

    Raises:
        CheckpointError: see :func:`require_plain_pickle`.
    """
    with as_checkpoint_error(path):
        data = _load_numpy_pickle(path)
        if "model" in data and "__author__" in data:
            return dict(data)
        blobs = data.get("blobs", data)
        weights = {name: value for name, value in blobs.items() if not name.endswith("_momentum")}
        return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def read_pycls_file(path: str) -> dict[str, Any]:
    """The weights in a file of pycls, in the form that Detectron2 gives them.

    Raises:
        CheckpointError: see :func:`read_torch_file`; or it has no 'model_state'.
    """
    with as_checkpoint_error(path):
        weights = read_torch_file(path).get("model_state")
        if not isinstance(weights, Mapping):
            raise CheckpointError(f"{path} has no 'model_state', which files of pycls have")
        weights = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
        return {"model": weights, "__author__": "pycls", "matching_heuristics": True}


def require_plain_pickle(path: str) -> None:
    """Refuse a pickle that holds more than numpy arrays in plain containers.

    Raises:
        CheckpointError: it does, or it is missing or damaged.
    """
    with as_checkpoint_error(path):
        _load_numpy_pickle(path)


def is_whole_checkpoint(path: str) -> bool:
    """Whether a file of ``torch.save`` is complete, its checksums hold, and torch can read a
    "model" in it."""
    try:
        if _first_damaged(path):
            return False
        _require_names(path, map_torch_file(path).get("model"))
    except Exception:  # damaged bytes may raise anything
        logger.debug("%s is not a whole checkpoint", path, exc_info=True)
        return False
    return True


def check_digest(url: str, path: str) -> None:
    """Refuse a download whose name ends in the start of its SHA-256, as torch.hub has it, and that
    is another file.

    Args:
        url: where it is from.
        path: the file here.

    Raises:
        CheckpointError: it is.
    """
    match = re.search(r"-([0-9a-f]{8,64})\.\w+$", url)
    if not match or _DATE.fullmatch(match.group(1)):
        return
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
    digest = sha256.hexdigest()
    if not digest.startswith(match.group(1)):
        raise CheckpointError(
            f"{url}: what was downloaded is not the file that its name says (SHA-256 {digest}); "
            f"remove {path} to try again, or give a file of your own"
        )


@contextmanager
def as_checkpoint_error(path: str) -> Iterator[None]:
    """Turn whatever a reader of ``path`` raises into a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # damaged bytes may raise anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"cannot read the weights {path} (damaged, or more than plain data): {reason[0]}"
        ) from error


def _first_damaged(path: str) -> str | None:
    """The first file in an archive whose checksum is wrong."""
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def _require_names(path: str, data: Any) -> Mapping[str, Any]:
    """``data``, which must have strings for keys."""
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, not named weights")
    other = next((key for key in data if not isinstance(key, str)), None)
    if other is not None:
        raise CheckpointError(f"{path} holds {other!r} where the name of a weight should be")
    return data


class _NumpyUnpickler(pickle.Unpickler):
    """Reads numpy arrays in plain containers; anything else in the file is refused."""

    _ALLOWED = {
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "scalar"),
        ("collections", "OrderedDict"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a file of weights")
        return super().find_class(module, name)


def _load_numpy_pickle(path: str) -> Mapping[str, Any]:
    with open(path, "rb") as file:
        return _require_names(path, _NumpyUnpickler(file, encoding="latin1").load())

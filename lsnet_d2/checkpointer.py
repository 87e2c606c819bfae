"""Checkpoints that are whole or absent, and are refused when they do not fit the model."""

import glob
import hashlib
import itertools
import logging
import os
import pickle
import re
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from .checkpoint import convert_lsnet_checkpoint, is_released_checkpoint
from .errors import CheckpointError, one_line
from .files import atomic_write, remove_partial_files
from .imagenet import convert_imagenet_weights, is_imagenet_checkpoint, some

logger = logging.getLogger(__name__)

# What "weights" of a checkpoint says about its "model".
TRAINED, AVERAGED = "trained", "averaged"


class LSNetCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, made safe.

    - A checkpoint appears under its name when it is complete, ``last_checkpoint`` after it. A
      training that is killed at any moment leaves a file to go on from.
    - A training that starts anew moves the checkpoints of an earlier one out of the way.
    - Files are read as data: nothing in them is executed. Downloads are checked where their name
      has a digest.
    - Of a training with averaged weights these are the "model" of a checkpoint, so that everybody
      gets what was evaluated.
    - With ``strict=True``, a checkpoint must have every weight of the model and no others.
    - Weights of the released LSNet code are renamed when a config is given, and those of ImageNet
      classifiers of torchvision and mmcv always.

    Attributes:
        resumed_from: the file that :meth:`resume_or_load` went on from, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        cfg: CfgNode | None = None,
        save_to_disk: bool | None = None,
        averaged: nn.Module | None = None,
        **checkpointables: Any,
    ) -> None:
        """
        Args:
            model, save_dir, save_to_disk, checkpointables: see Detectron2. ``save_dir`` is local.
            cfg: config of the model, to convert checkpoints of the released code for.
            averaged: a model with averaged weights, which are saved for those of ``model``. What
                saves the trained ones must be among the checkpointables.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.cfg = cfg
        self.averaged = averaged
        self.resumed_from: str | None = None
        self._source = ""
        self._strict = False

    def save(self, name: str, *, as_last: bool = True, **kwargs: Any) -> None:
        """Write ``{save_dir}/{name}.pth``, and then its name to ``last_checkpoint``.

        Args:
            as_last: whether it is written there.
            kwargs: more of what the file holds.

        Raises:
            CheckpointError: it cannot be written. Nothing is left of it, and what was there under
                its name stays.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        model, kind = (self.averaged, AVERAGED) if self.averaged else (self.model, TRAINED)
        data = {"model": model.state_dict(), "weights": kind}
        data.update({key: value.state_dict() for key, value in self.checkpointables.items()})
        data.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        logger.info("Saving checkpoint to %s (%s weights)", path, kind)
        try:
            with atomic_write(path) as file:
                torch.save(data, file)
            if as_last:
                self.tag_last_checkpoint(f"{name}.pth")
        except (OSError, RuntimeError) as error:  # torch hides the first by the second
            if any(isinstance(hidden, KeyboardInterrupt) for hidden in _with_reasons(error)):
                raise KeyboardInterrupt from error
            raise CheckpointError(
                f"cannot write {path}: {_os_reason(error)}. Nothing is left of it; once this is "
                "mended, --resume goes on from the checkpoint before"
            ) from error

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with atomic_write(os.path.join(self.save_dir, "last_checkpoint"), "w") as file:
            file.write(last_filename_basename)

    def load(
        self, path: str, checkpointables: list[str] | None = None, *, strict: bool = False
    ) -> dict[str, Any]:
        """Load weights, and by default all that was saved with them.

        Args:
            path: file or URL that Detectron2 knows; empty leaves the model as it is.
            checkpointables: what to load besides the weights; None: all that the file has.
            strict: refuse a checkpoint that does not fit exactly. Otherwise weights that are
                missing or have another shape stay as they are, with a warning; at least one must
                fit.

        Raises:
            CheckpointError: the file is missing, damaged, not safe to read, or does not fit.
        """
        if path:
            self._require_file(path)
        elif strict:
            raise CheckpointError("no weights given: MODEL.WEIGHTS is empty")
        self._source, self._strict = path, strict
        return super().load(path, checkpointables)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Go on from the last checkpoint in ``save_dir``; without one, load weights from ``path``.

        A checkpoint that is missing or damaged is passed over for the newest whole one, with a
        warning. In a distributed run the main process decides. What starts from ``path`` is a
        training of its own: see :meth:`set_aside`.

        Raises:
            CheckpointError: there are checkpoints, but none is whole, or the state of the training
                does not fit this one; see also :meth:`load`.
        """
        self.resumed_from = None
        if resume:
            self.resumed_from = self._find_for_all()
            if self.resumed_from:
                return self._resume(self.resumed_from)
            logger.info("No checkpoint in %s: starting from MODEL.WEIGHTS", self.save_dir)
        rest = self.load(path, checkpointables=[])
        comm.synchronize()  # ``path`` may be one of the files that are moved now
        if self.save_to_disk:
            self.set_aside()
        return rest

    def _find_for_all(self) -> str | None:
        """What the main process finds, or raises, in every process: none waits for another."""
        found, error = None, None
        if comm.is_main_process():
            try:
                found = self.find_checkpoint()
            except CheckpointError as exception:
                error = exception
        found, error = comm.all_gather((found, error))[0]
        if error is not None:
            raise error
        return found

    def set_aside(self) -> None:
        """Move the checkpoints in ``save_dir`` into a folder below it, with the time in its name.

        Otherwise a new training that is killed before its first checkpoint would be resumed from
        them. While files are moved there is an empty ``last_checkpoint``: it says that none of
        them counts, whenever a kill may come. Afterwards there is none, as in a new folder.
        """
        if not self.save_dir:
            return
        if files := self._checkpoints():
            self.tag_last_checkpoint("")
            self._move_aside(files)
        Path(self.save_dir, "last_checkpoint").unlink(missing_ok=True)

    def _move_aside(self, files: list[str]) -> None:
        now = time.strftime("%Y-%m-%d_%H-%M-%S")
        for number in itertools.count(1):
            folder = Path(self.save_dir, f"earlier_{now}" + (f"_{number}" if number > 1 else ""))
            try:
                folder.mkdir()
                break
            except FileExistsError:
                continue
        for file in files:
            os.replace(file, folder / os.path.basename(file))
        logger.info("Moved the checkpoints of an earlier training to %s", folder)

    def _resume(self, path: str) -> dict[str, Any]:
        try:
            rest = self.load(path, strict=True)
        except (ValueError, KeyError) as error:  # of the optimizer, for one
            raise CheckpointError(
                f"{path}: the state of its training does not fit ({one_line(error)}). What is "
                "trained, above all MODEL.BACKBONE.FREEZE_AT, and SOLVER must be as they were; to "
                "start anew from its weights, give it as MODEL.WEIGHTS without --resume"
            ) from error
        if "iteration" not in rest:
            raise CheckpointError(
                f"{path} holds weights only, and no training to go on with; "
                "to start from it, give it as MODEL.WEIGHTS without --resume"
            )
        return rest

    def find_checkpoint(self) -> str | None:
        """The file to go on from, or None where nothing was saved. Removes partial files."""
        for name in remove_partial_files(self.save_dir):
            logger.warning("Removed %s, a checkpoint cut short in %s", name, self.save_dir)
        files = self._checkpoints()
        if self.has_checkpoint():
            last = self.get_checkpoint_file()
            if last == os.path.join(self.save_dir, ""):  # see set_aside
                return None
            files = [last] + [file for file in files if file != last]
        for file in files:
            if _is_whole(file):
                if file != files[0]:
                    logger.warning("Going on from %s instead", file)
                return file
            logger.warning("Checkpoint %s is missing or damaged", file)
        if files:
            raise CheckpointError(f"none of the checkpoints in {self.save_dir} can be read")
        return None

    def _checkpoints(self) -> list[str]:
        """The files of checkpoints in ``save_dir``, newest first."""
        files = glob.glob(os.path.join(glob.escape(self.save_dir), "model_*.pth"))
        return sorted(files, key=os.path.getmtime, reverse=True)

    def _require_file(self, path: str) -> None:
        url = path.partition("?")[0]
        try:
            local = self.path_manager.get_local_path(url)
        except OSError as error:
            raise CheckpointError(f"cannot get the weights {url}: {error}") from error
        if not os.path.isfile(local):
            raise CheckpointError(f"no such file of weights: {url}")
        if "://" in url:
            _check_digest(url, local)

    def _load_file(self, filename: str) -> dict[str, Any]:
        with _reading(filename):
            if filename.endswith(".pkl"):
                loaded = _from_model_zoo(_load_numpy_pickle(filename))
            elif filename.endswith(".pyth"):
                loaded = _from_pycls(_load_torch_file(filename))
            else:
                loaded = super()._load_file(filename)
        if loaded.get("weights") == AVERAGED:
            logger.info("%s has averaged weights (SOLVER.EMA)", filename)
        weights = _named_weights(filename, loaded)
        try:
            if self.cfg is not None and is_released_checkpoint(weights):
                weights = convert_lsnet_checkpoint(weights, self.cfg)
            elif is_imagenet_checkpoint(weights):
                weights = convert_imagenet_weights(weights)
        except ValueError as error:
            raise CheckpointError(f"{filename}: {error}") from error
        return {**loaded, "model": weights}

    def _torch_load(self, f: str) -> Mapping[str, Any]:
        return _load_torch_file(f)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        try:
            incompatible = super()._load_model(checkpoint)
        except ValueError as error:  # something that is no tensor
            raise CheckpointError(f"{self._source}: {error}") from error
        names = set(self.model.state_dict())
        if names <= set(incompatible.missing_keys):
            raise CheckpointError(f"{self._source}: none of the weights is one of this model's")
        if incompatible.incorrect_shapes and not self._strict:
            logger.warning(
                "%d weights of %s have other shapes than the model's and are trained anew; "
                "is the number of classes meant to differ?",
                len(incompatible.incorrect_shapes),
                self._source,
            )
        if self._strict:
            self._refuse_misfit(incompatible)
        return incompatible

    def _refuse_misfit(self, incompatible: Any) -> None:
        shapes = {name: (theirs, ours) for name, theirs, ours in incompatible.incorrect_shapes}
        # counters of batch-norm layers that older checkpoints lack; they have no effect
        missing = [
            name
            for name in incompatible.missing_keys
            if name not in shapes and not name.endswith("num_batches_tracked")
        ]
        problems = []
        if missing:
            problems.append(f"{len(missing)} weights are missing ({some(missing, 3)})")
        if incompatible.unexpected_keys:
            unused = incompatible.unexpected_keys
            problems.append(f"{len(unused)} are of no use ({some(unused, 3)})")
        if shapes:
            name, (theirs, ours) = next(iter(shapes.items()))
            problems.append(
                f"{len(shapes)} have another shape ({name}: {theirs} in the checkpoint, "
                f"{ours} in the model)"
            )
        if problems:
            raise CheckpointError(
                f"{self._source} is a checkpoint of another model: {'; '.join(problems)}. "
                "Architecture, task and number of classes must be those of its training"
            )


def read_weights(path: str) -> Mapping[str, Any]:
    """The weights in a file of ``torch.save``, by the names they have there.

    Raises:
        CheckpointError: the file is missing, damaged, or holds more than plain data.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"no such file of weights: {path}")
    with _reading(path):
        return _named_weights(path, _load_torch_file(path))


def _check_digest(url: str, path: str) -> None:
    """Refuse a download whose name ends in the start of its SHA-256, as torch.hub has it, and that
    is another file."""
    match = re.search(r"-([0-9a-f]{8,64})\.\w+$", url)
    if not match:
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
def _reading(path: str) -> Iterator[None]:
    """Turn whatever a reader of pickles raises into a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # damaged bytes may raise anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"cannot read the weights {path} (damaged, or more than plain data): {reason[0]}"
        ) from error


def _load_torch_file(path: str) -> Mapping[str, Any]:
    # torch does not look at the checksums of an archive; it reads a damaged tensor as it is
    if zipfile.is_zipfile(path) and (damaged := _first_damaged(path)):
        raise CheckpointError(f"{path} is damaged: the checksum of {damaged} is wrong")
    return _require_names(path, torch.load(path, map_location="cpu", weights_only=True))


def _named_weights(path: str, data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Out of what stands beside them: Detectron2 saves them as "model", mmdetection as
    "state_dict"."""
    for key in ("model", "state_dict"):
        if key in data:
            data = _require_names(path, data[key])
    return data


def _require_names(path: str, data: Any) -> Mapping[str, Any]:
    """``data``, which must have strings for keys."""
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, not named weights")
    other = next((key for key in data if not isinstance(key, str)), None)
    if other is not None:
        raise CheckpointError(f"{path} holds {other!r} where the name of a weight should be")
    return data


def _first_damaged(path: str) -> str | None:
    """The first file in an archive whose checksum is wrong."""
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def _is_whole(path: str) -> bool:
    """Whether a file of torch.save is complete, its checksums hold, and torch can read it."""
    try:
        if _first_damaged(path):
            return False
        # the tensors themselves stay on the disk
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        _require_names(path, _require_names(path, data).get("model"))
    except Exception:  # damaged bytes may raise anything
        logger.debug("%s is not a whole checkpoint", path, exc_info=True)
        return False
    return True


def _os_reason(error: BaseException) -> str:
    """What the system says, which may stand behind another error."""
    for seen in _with_reasons(error):
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
    return one_line(error)


def _with_reasons(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that stand behind it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


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


def _from_model_zoo(data: Mapping[str, Any]) -> dict[str, Any]:
    """Detectron2's zoo names its author; other pickles are Caffe2's and matched by heuristics."""
    if "model" in data and "__author__" in data:
        return dict(data)
    blobs = data.get("blobs", data)
    weights = {name: value for name, value in blobs.items() if not name.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _from_pycls(data: Mapping[str, Any]) -> dict[str, Any]:
    """Files of pycls, as Detectron2 takes them."""
    weights = data.get("model_state")
    if not isinstance(weights, Mapping):
        raise CheckpointError("no 'model_state', which files of pycls have")
    weights = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    return {"model": weights, "__author__": "pycls", "matching_heuristics": True}


def require_plain_pickle(path: str) -> None:
    """Refuse a pickle that holds more than numpy arrays in plain containers.

    Raises:
        CheckpointError: it does, or it is missing or damaged.
    """
    with _reading(path):
        _load_numpy_pickle(path)

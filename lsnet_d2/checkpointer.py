"""Checkpoints that are whole or absent, and are refused when they do not fit the model."""

import glob
import itertools
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from .checkpoint import convert_lsnet_checkpoint, is_released_checkpoint
from .description import KEY as DESCRIPTION_KEY
from .errors import CheckpointError, one_line
from .files import atomic_write, remove_partial_files
from .imagenet import convert_imagenet_weights, is_imagenet_checkpoint, some
from .weight_files import (
    as_checkpoint_error,
    check_digest,
    is_whole_checkpoint,
    named_weights,
    read_model_zoo_pickle,
    read_pycls_file,
    read_torch_file,
)

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
        description: Mapping[str, Any] | None = None,
        **checkpointables: Any,
    ) -> None:
        """
        Args:
            model, save_dir, save_to_disk, checkpointables: see Detectron2. ``save_dir`` is local.
            cfg: config of the model, to convert checkpoints of the released code for.
            averaged: a model with averaged weights, which are saved for those of ``model``. What
                saves the trained ones must be among the checkpointables.
            description: see :func:`lsnet_d2.description.describe_model`; it is saved with the
                weights, and whoever has the file needs no other.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.cfg = cfg
        self.averaged = averaged
        self.description = description
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
        data: dict[str, Any] = {"model": model.state_dict(), "weights": kind}
        if self.description:
            data[DESCRIPTION_KEY] = self.description
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
            self.resumed_from = self.last_checkpoint()
            if self.resumed_from:
                return self._resume(self.resumed_from)
            logger.info("No checkpoint in %s: starting from MODEL.WEIGHTS", self.save_dir)
        rest = self.load(path, checkpointables=[])
        comm.synchronize()  # ``path`` may be one of the files that are moved now
        if self.save_to_disk:
            self.set_aside()
        return rest

    def last_checkpoint(self, *, clean: bool = True) -> str | None:
        """:meth:`find_checkpoint` of the main process, in every process.

        Raises:
            CheckpointError: there are checkpoints, but none is whole.
        """
        # All raise what it raises: none waits for another.
        found, error = None, None
        if comm.is_main_process():
            try:
                found = self.find_checkpoint(clean=clean)
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

    def find_checkpoint(self, *, clean: bool = True) -> str | None:
        """The file to go on from, or None where nothing was saved.

        Args:
            clean: whether partial files are removed. A training that runs may be writing one.
        """
        for name in remove_partial_files(self.save_dir) if clean else ():
            logger.warning("Removed %s, a checkpoint cut short in %s", name, self.save_dir)
        files = self._checkpoints()
        if self.has_checkpoint():
            last = self.get_checkpoint_file()
            if last == os.path.join(self.save_dir, ""):  # see set_aside
                return None
            files = [last] + [file for file in files if file != last]
        for file in files:
            if is_whole_checkpoint(file):
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
            check_digest(url, local)

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".pkl"):
            loaded = read_model_zoo_pickle(filename)
        elif filename.endswith(".pyth"):
            loaded = read_pycls_file(filename)
        else:
            with as_checkpoint_error(filename):  # an option behind a "?" may be unknown
                loaded = super()._load_file(filename)
        if loaded.get("weights") == AVERAGED:
            logger.info("%s has averaged weights (SOLVER.EMA)", filename)
        weights = named_weights(filename, loaded)
        try:
            if self.cfg is not None and is_released_checkpoint(weights):
                weights = convert_lsnet_checkpoint(weights, self.cfg)
            elif is_imagenet_checkpoint(weights):
                weights = convert_imagenet_weights(weights)
        except ValueError as error:
            raise CheckpointError(f"{filename}: {error}") from error
        return {**loaded, "model": weights}

    def _torch_load(self, f: str) -> Mapping[str, Any]:
        return read_torch_file(f)

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
                "Architecture, task, number of classes and options that add layers must be those "
                "of its training"
            )


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

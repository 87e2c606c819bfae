"""Errors of input, which a tool reports in one line, as opposed to bugs."""

import errno
import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import ParamSpec, TypeVar

# What the system refuses for reasons that no program can mend.
_REFUSALS = {
    getattr(errno, name)
    for name in ("EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "EFBIG", "EIO", "EMFILE", "ENFILE")
    if hasattr(errno, name)
}

P = ParamSpec("P")
T = TypeVar("T")


class UserError(Exception):
    """Something outside the program is wrong; the message names the file, annotation or key.

    Attributes:
        in_all_processes: whether every process of a training raises it, with the same message.
    """

    in_all_processes = False

    def everywhere(self) -> "UserError":
        """This error, as one that all processes raise."""
        self.in_all_processes = True
        return self


class ConfigError(UserError):
    """A config file or a key of it."""


class CheckpointError(UserError):
    """A file of weights: missing, damaged, unsafe, or of another model."""


class TrainingError(UserError):
    """A training cannot go on."""


class NonFiniteWeightsError(TrainingError):
    """A weight, or a statistic of batch norm, is infinite or not a number."""


class DeadWorkerError(UserError):
    """A process that loads images has ended."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"a process that loads images has ended ({reason}). There may be too little memory: "
            "try a lower DATALOADER.NUM_WORKERS"
        )

    @classmethod
    def find(cls, error: BaseException) -> "DeadWorkerError | None":
        """The error that ``error`` is, or that torch means by it.

        Torch raises it anywhere, whatever the main process is doing.
        """
        if isinstance(error, cls):
            return error
        if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid"):
            return cls(one_line(error).partition(" It is possible")[0].rstrip("."))
        return None


class NonFiniteLossError(TrainingError):
    """A loss is infinite or not a number. It is raised in all processes of a training.

    Attributes:
        iteration: the one that they are of.
        losses: those that are not finite, by name.
        file_names: of the images of this iteration, in the process where it happened.
    """

    in_all_processes = True

    def __init__(
        self,
        iteration: int,
        losses: Mapping[str, float],
        file_names: Sequence[str],
        *,
        process: int | None = None,
    ) -> None:
        """
        Args:
            process: its rank; None: there is only one.
        """
        self.iteration = iteration
        self.losses = dict(losses)
        self.file_names = list(file_names)
        found = ", ".join(f"{name} is {value:g}" for name, value in losses.items())
        where = "" if process is None else f" in process {process}"
        super().__init__(
            f"iteration {iteration}{where}: {found}, for the images {', '.join(file_names)}. The "
            "weights were not changed by it. Look at these images and their annotations "
            "(tools/visualize_data.py); otherwise a lower SOLVER.BASE_LR, a longer "
            "SOLVER.WARMUP_ITERS or SOLVER.CLIP_GRADIENTS may help"
        )


def exit_on_user_error(*errors: type[Exception]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator of a tool's entry: a user error becomes one line on stderr and exit status 2.

    So does what the system refuses: a full disk, missing permissions, a read-only file system; and
    the end of a process that loads images.

    Args:
        errors: classes that count as user errors besides :class:`UserError`.
    """

    def decorate(main: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(main)
        def run(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return main(*args, **kwargs)
            except (UserError, *errors) as error:
                print(f"error: {one_line(error)}", file=sys.stderr)
                sys.exit(2)
            except OSError as error:
                if error.errno not in _REFUSALS:
                    raise
                print(f"error: {system_message(error)}", file=sys.stderr)
                sys.exit(2)
            except RuntimeError as error:
                if not (dead := DeadWorkerError.find(error)):
                    raise
                print(f"error: {dead}", file=sys.stderr)
                sys.exit(2)

        return run

    return decorate


def one_line(error: Exception) -> str:
    """The message of an error, also of one that was raised in a worker of a data loader."""
    text = str(error).strip()
    if text.startswith("Caught ") and "Original Traceback" in text:
        # torch puts the traceback of the worker into the message; its last line is ours
        text = text.splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())


def system_message(error: OSError) -> str:
    """What the system said, after the file that it said it of."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """'; did you mean A or B?' where known names are close, else an empty string."""
    close = get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""

"""Errors of input, which a tool reports in one line, as opposed to bugs."""

import functools
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class UserError(Exception):
    """Something outside the program is wrong; the message names the file, annotation or key."""


class ConfigError(UserError):
    """A config file or a key of it."""


class CheckpointError(UserError):
    """A file of weights: missing, damaged, unsafe, or of another model."""


def exit_on_user_error(*errors: type[Exception]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator of a tool's entry: a user error becomes one line on stderr and exit status 2.

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

        return run

    return decorate


def one_line(error: Exception) -> str:
    """The message of an error, also of one that was raised in a worker of a data loader."""
    text = str(error).strip()
    if text.startswith("Caught ") and "Original Traceback" in text:
        # torch puts the traceback of the worker into the message; its last line is ours
        text = text.splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """'; did you mean A or B?' where known names are close, else an empty string."""
    close = get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""

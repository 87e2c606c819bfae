"""Files that appear under their names only when they are complete."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .errors import UserError

PARTIAL_SUFFIX = ".partial"


@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """Open a file for writing; it takes its place when the block ends without an error.

    The data goes to ``.{name}.partial`` in the same folder, is flushed to the disk, and replaces
    ``path`` in one step. Whoever reads ``path`` sees the old content or the new one. After an
    error, or a kill, the old content stays. Errors of the system name ``path``.

    Args:
        path: a local file; its folder must exist.
        mode: "wb" or "w" (UTF-8).
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}{PARTIAL_SUFFIX}")
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(partial)):
            error.filename = str(path)
        with suppress(OSError):  # of a read-only folder, above all; the first error is to be seen
            partial.unlink(missing_ok=True)
        raise


@contextmanager
def keeping(path: str | os.PathLike) -> Iterator[None]:
    """Let a file have, after the block, what it had before; one that is not there may appear."""
    content = Path(path).read_bytes() if os.path.isfile(path) else None
    try:
        yield
    finally:
        if content is not None and Path(path).read_bytes() != content:
            with atomic_write(path) as file:
                file.write(content)


def remove_partial_files(folder: str | os.PathLike) -> list[str]:
    """Remove what killed writers left in ``folder``; returns the names."""
    leftovers = sorted(Path(folder).glob(f".*{PARTIAL_SUFFIX}"))
    for file in leftovers:
        file.unlink(missing_ok=True)
    return [file.name for file in leftovers]


def require_new_file(path: str, *, overwrite: bool = False) -> None:
    """Find before the work is done whether its result can be written.

    Raises:
        UserError: there is such a file and it is not to be replaced, no folder for it, or one that
            cannot be written into.
    """
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder")
    if os.path.exists(path) and not overwrite:
        raise UserError(f"{path} exists: give --overwrite to replace it")
    folder = os.path.dirname(path)
    if not os.path.isdir(folder or "."):
        raise UserError(f"{path}: no such folder: {folder}")
    require_writable(folder or ".")


def make_folder(path: str | os.PathLike) -> Path:
    """The folder, made if there is none.

    Raises:
        UserError: a file is in the way, or it cannot be made.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot make this folder: {error.strerror}") from error
    return Path(path)


def require_writable(folder: str | os.PathLike) -> None:
    """Find before the work is done whether files can be written into a folder.

    Raises:
        UserError: they cannot, because of permissions, a read-only file system, or a full one.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"{folder}: cannot write into this folder: {error.strerror or error}"
        ) from error

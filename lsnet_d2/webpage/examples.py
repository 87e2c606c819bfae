"""Pictures that the page offers to try."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from detectron2.data import Metadata
from PIL import Image

from ..data.images import IMAGE_SUFFIXES, ImageError, encode_image, read_image
from ..errors import UserError

MAX_EXAMPLES = 8
_THUMBNAIL_SIDE = 192  # pixels

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """A file on this machine, and a small JPEG of it."""

    path: Path
    thumbnail: bytes

    @classmethod
    def of(cls, path: Path) -> "Example":
        """
        Raises:
            ImageError: it cannot be read.
        """
        picture = Image.fromarray(read_image(str(path), "RGB"))
        picture.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
        return cls(path, encode_image(picture, "JPEG", quality=88))


def find_examples(paths: Iterable[str] | None, metadata: Metadata | None) -> list[Example]:
    """The pictures to offer, MAX_EXAMPLES at most. Damaged ones are left out with a warning.

    Args:
        paths: files, and folders of images. None: the first images of the model's data set, if it
            is on this machine.
        metadata: of the data set.

    Raises:
        UserError: a path names nothing.
    """
    files: list[Path] = []
    if paths is None:
        folder = Path((metadata.get("image_root") if metadata else None) or "")
        if folder.name and folder.is_dir():
            files = _images_in(folder)
    for path in map(Path, paths or ()):
        found = _images_in(path) if path.is_dir() else [path] if path.is_file() else []
        if not found:
            raise UserError(f"--examples {path}: no such image, or folder without images")
        files += found
    examples: list[Example] = []
    for file in files:
        if len(examples) == MAX_EXAMPLES:
            break
        try:
            examples.append(Example.of(file))
        except ImageError as error:
            logger.warning("No example: %s", error)
    return examples


def _images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)

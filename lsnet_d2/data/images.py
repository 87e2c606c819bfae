"""Images from files and from memory, with errors that name them."""

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import detectron2.data.transforms as T
import numpy as np
from detectron2.data.detection_utils import _apply_exif_orientation, convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager
from PIL import ExifTags, Image, UnidentifiedImageError

from ..errors import UserError

# What PIL raises over damaged files.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
_TURNED = (5, 6, 7, 8)  # orientations in EXIF data that exchange width and height

# How the names of files end that are taken for images in a folder.
IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}

ImageLike = str | os.PathLike | np.ndarray | Image.Image


class ImageError(UserError):
    """An image is missing, damaged, not what the annotation says, or has pixels of another kind."""


def load_image(
    image: ImageLike, image_format: str, *, array_format: str = "BGR", name: str = "image"
) -> np.ndarray:
    """An image from a file (:func:`read_image`) or from memory (:func:`convert_image`).

    Raises:
        ImageError: see the two.
        TypeError: ``image`` is something else.
    """
    if isinstance(image, (str, os.PathLike)):
        return read_image(os.fspath(image), image_format)
    if isinstance(image, (np.ndarray, Image.Image)):
        return convert_image(image, image_format, array_format=array_format, name=name)
    raise TypeError(
        f"{name} is of type {type(image).__name__}; it must be a path, an array or an image of PIL"
    )


def read_image(file_name: str, image_format: str) -> np.ndarray:
    """Read a whole image and turn it as its EXIF data say.

    Grey images get three equal channels, transparency is dropped. Of 16 bits a channel the upper
    8 are kept (Detectron2's reader makes everything from 255 upwards white).

    Args:
        file_name: a path, or what Detectron2's ``PathManager`` understands.
        image_format: ``INPUT.FORMAT``: "BGR", "RGB", "L" or another one of Detectron2's.

    Returns:
        (H, W, C), uint8 for the formats above.

    Raises:
        ImageError: there is no such file, it is truncated or no image, or its pixels are real
            numbers.
    """
    with _open_image(file_name) as image:
        image = _upright(image)
    return _to_array(image, image_format, file_name)


def read_image_size(file_name: str) -> tuple[int, int]:
    """(height, width) of what :func:`read_image` gives, without decoding the pixels (but for PNG,
    which may have its EXIF data after them).

    Raises:
        ImageError: there is no such file, or it is no image. A truncated one may not be found out.
    """
    with _open_image(file_name) as image:
        width, height = image.size
        if image.format == "TIFF":  # whose size versions of PIL turn themselves, or do not
            tags = ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength
            width, height = (image.tag_v2[tag] for tag in tags)
        turned = _orientation(image) in _TURNED
    return (width, height) if turned else (height, width)


def _upright(image: Image.Image) -> Image.Image:
    """With the pixels read."""
    image.load()  # turns a TIFF
    return _apply_exif_orientation(image)


def _orientation(image: Image.Image) -> int:
    """As the EXIF data say; 1, upright, where they cannot be read: the pixels may be sound."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except OSError:  # of PNG, which may have them after the pixels: those are truncated
        raise
    except Exception:  # of many kinds; Detectron2's reader lets them pass too
        return 1


@contextmanager
def _open_image(file_name: str) -> Iterator[Image.Image]:
    try:
        with PathManager.open(file_name, "rb") as file, Image.open(file) as image:
            yield image
    except FileNotFoundError as error:
        raise ImageError(f"{file_name}: no such image file") from error
    except _DAMAGE as error:
        raise ImageError(f"{file_name}: {_reason(error)}") from error


def open_image(file: BinaryIO, name: str, *, formats: Sequence[str] | None = None) -> Image.Image:
    """Open an image file that is in memory: size and kind are known, the pixels not read yet.

    Args:
        file: must stay open until they are.
        name: of the image, for messages; it becomes ``filename`` of the result.
        formats: the kinds that are tried, as PIL calls them; None: all.

    Raises:
        ImageError: it is no image of these kinds. A truncated one is found when it is read.
    """
    try:
        image = Image.open(file, formats=formats)
    except _DAMAGE as error:
        raise ImageError(f"{name}: {_reason(error)}") from error
    image.filename = name
    return image


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"too large: {error}"
    if isinstance(error, UnidentifiedImageError):  # names a Python object
        error = "it begins like no kind of image that is known"
    return f"not a complete image file: {error}"


def convert_image(
    image: Image.Image | np.ndarray,
    image_format: str,
    *,
    array_format: str = "BGR",
    name: str = "image",
) -> np.ndarray:
    """An image in memory as :func:`read_image` would give it.

    Args:
        image: of PIL, which is turned as its EXIF data say, or an array (H, W), (H, W, 1),
            (H, W, 3) or (H, W, 4), uint8 or uint16. The fourth channel is dropped.
        image_format: see :func:`read_image`.
        array_format: "BGR" or "RGB": the order of the channels of an array.
        name: of the image, for messages.

    Raises:
        ImageError: the array has another shape or type, the pixels do not fit into 16 bits, or the
            file that PIL has opened, and not read yet, is damaged.
    """
    if isinstance(image, np.ndarray):
        image = _to_image(image, array_format, name)
    try:
        image = _upright(image)
    except _DAMAGE as error:
        raise ImageError(f"{name}: not a complete image: {error}") from error
    return _to_array(image, image_format, name)


def _to_array(image: Image.Image, image_format: str, name: str) -> np.ndarray:
    if image.mode.startswith("I"):
        image = Image.fromarray(_upper_byte(np.asarray(image), name))
    elif image.mode == "F":
        raise ImageError(f"{name}: pixels are real numbers; convert the image to 8 bits")
    return convert_PIL_to_numpy(image, image_format)


def _to_image(pixels: np.ndarray, array_format: str, name: str) -> Image.Image:
    channels = 1 if pixels.ndim == 2 else pixels.shape[-1]
    if pixels.ndim not in (2, 3) or channels not in (1, 3, 4) or not pixels.size:
        raise ImageError(
            f"{name}: an array of shape {pixels.shape}; it must be (height, width) or (height, "
            "width, channels) with 1, 3 or 4 channels"
        )
    if pixels.dtype == np.uint16:
        pixels = _upper_byte(pixels, name)
    if pixels.dtype != np.uint8:
        raise ImageError(f"{name}: an array of {pixels.dtype}; it must be uint8 or uint16")
    if channels == 1:
        pixels = pixels.reshape(pixels.shape[:2])
    else:
        pixels = pixels[:, :, :3] if array_format == "RGB" else pixels[:, :, 2::-1]
    return Image.fromarray(np.ascontiguousarray(pixels))


def _upper_byte(pixels: np.ndarray, name: str) -> np.ndarray:
    if pixels.size and (pixels.min() < 0 or pixels.max() > 0xFFFF):
        raise ImageError(f"{name}: more than 16 bits a channel; convert the image to 8 bits")
    return (pixels >> 8).astype(np.uint8)


class NamedAugInput(T.AugInput):
    """An image to augment, which is refused by its name where resizing leaves nothing of it."""

    def __init__(self, image: np.ndarray, name: str) -> None:
        super().__init__(image)
        self.name = name

    def transform(self, tfm: T.Transform) -> None:
        """
        Raises:
            ImageError: see :func:`check_resizing`.
        """
        if isinstance(tfm, T.ResizeTransform):
            check_resizing(self.name, (tfm.h, tfm.w), (tfm.new_h, tfm.new_w))
        super().transform(tfm)


def check_resizing(name: str, size: tuple[int, int], new_size: tuple[int, int]) -> None:
    """
    Args:
        name: of the image, for messages.
        size, new_size: (height, width) in pixels.

    Raises:
        ImageError: a side would have no pixel.
    """
    if min(new_size) < 1:
        (height, width), (new_height, new_width) = size, new_size
        raise ImageError(
            f"{name}: too narrow to be resized: its {width} x {height} pixels would become "
            f"{new_width} x {new_height}"
        )


def encode_image(image: Image.Image, file_format: str, **options: Any) -> bytes:
    """The content of an image file.

    Pillow, given a file, does not notice that a disk is full while it writes a JPEG.

    Args:
        file_format: Pillow's name of it.
        options: of Pillow's writer.
    """
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()

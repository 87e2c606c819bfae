"""Reading image files, with errors that name them."""

import numpy as np
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager
from PIL import Image, ImageOps

from ..errors import UserError


class ImageError(UserError):
    """An image file is missing, damaged, or not what the annotation says."""


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
    try:
        with PathManager.open(file_name, "rb") as file, Image.open(file) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
    except FileNotFoundError as error:
        raise ImageError(f"{file_name}: no such image file") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ImageError(f"{file_name}: not a complete image file: {error}") from error
    if image.mode.startswith("I"):
        image = Image.fromarray(_upper_byte(np.asarray(image), file_name))
    elif image.mode == "F":
        raise ImageError(f"{file_name}: pixels are real numbers; convert the image to 8 bits")
    return convert_PIL_to_numpy(image, image_format)


def _upper_byte(pixels: np.ndarray, file_name: str) -> np.ndarray:
    if pixels.size and (pixels.min() < 0 or pixels.max() > 0xFFFF):
        raise ImageError(f"{file_name}: more than 16 bits a channel; convert the image to 8 bits")
    return (pixels >> 8).astype(np.uint8)

"""What the page gets for an uploaded picture: its detections, as numbers and as files."""

import base64
import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib.colors
from detectron2.data import Metadata
from PIL import Image

from ..data.catalog import class_name
from ..data.images import ImageError, convert_image, encode_image, open_image
from ..drawing import KEYPOINT_THRESHOLD, skeleton_bones
from ..exports import Results

# As PIL calls them. Others are not tried: for some of them PIL starts further programs.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "GIF")

MAX_SHOWN_SIDE = 2000  # pixels; what is drawn over a larger picture stays where it belongs
_MAX_NAME = 120


@dataclass(frozen=True)
class Limits:
    """What is accepted from the page.

    Attributes:
        megabytes: of an uploaded file, in 10^6 bytes.
        megapixels: of a picture, in 10^6 pixels.
    """

    megabytes: float = 20.0
    megapixels: float = 40.0

    @property
    def bytes(self) -> int:
        return int(self.megabytes * 1e6)

    def check_size(self, name: str, width: int, height: int) -> None:
        """
        Raises:
            ImageError: the picture has too many pixels.
        """
        if width * height > self.megapixels * 1e6:
            raise ImageError(
                f"{name}: {width} x {height} pixels are more than the {self.megapixels:g} "
                "megapixels that are accepted here (--max-megapixels)"
            )


def answer(
    predict: Callable[[Image.Image], Results],
    data: bytes,
    name: str,
    *,
    limits: Limits,
    keypoint_threshold: float = KEYPOINT_THRESHOLD,
) -> dict[str, Any]:
    """Run a model on an uploaded file. Nothing of it is written to the disk.

    Args:
        predict: a :class:`lsnet_d2.LSNetPredictor`.
        data: the file's content.
        name: of the file, for messages and for the ``imagePath`` of labelme.
        limits: checked before the pixels are decoded.
        keypoint_threshold: keypoints are drawn and written above this score.

    Returns:
        For JSON. Coordinates are pixels of the upright picture; all lists of detections have one
        order, best first:

        - ``name``, ``width``, ``height``, ``seconds`` that the model took
        - ``picture``: a data URL of a JPEG, of at most MAX_SHOWN_SIDE pixels a side
        - ``detections``: of each ``label``, ``score`` and ``box`` (x0, y0, x1, y1)
        - ``extreme_points``: of each four (x, y); None if the model has none
        - ``coco``, ``labelme``, ``geojson``: see :class:`lsnet_d2.Results`

    Raises:
        ImageError: the file is damaged, of no accepted kind, or too large; or the model cannot
            take it (see :class:`lsnet_d2.LSNetPredictor`).
        UserError: the data set of the model does not fit it (see :class:`lsnet_d2.Results`).
    """
    name = clean_name(name)
    with open_image(io.BytesIO(data), name, formats=FORMATS) as image:
        limits.check_size(name, *image.size)
        pixels = convert_image(image, "RGB", name=name)
        start = time.perf_counter()
        results = predict(image)
        seconds = time.perf_counter() - start
    height, width = results.image_size
    metadata = Metadata() if results.metadata is None else results.metadata
    boxes = results.pred_boxes.tensor.tolist()
    labels = [class_name(metadata, label) for label in results.pred_classes.tolist()]
    has_extremes = results.has("pred_extreme_points")
    return {
        "name": name,
        "width": width,
        "height": height,
        "seconds": round(seconds, 2),
        "picture": data_url(Image.fromarray(pixels)),
        "detections": [
            {"label": label, "score": score, "box": box}
            for label, score, box in zip(labels, results.scores.tolist(), boxes, strict=True)
        ],
        "extreme_points": results.pred_extreme_points.tolist() if has_extremes else None,
        "coco": results.to_coco(image_id=0),
        "labelme": results.to_labelme(image_path=name, keypoint_threshold=keypoint_threshold),
        "geojson": results.to_geojson(keypoint_threshold=keypoint_threshold),
    }


def clean_name(name: str) -> str:
    """The last part of a file's name as the browser gave it, without what cannot be printed."""
    last = name.replace("\\", "/").rpartition("/")[2]
    return "".join(filter(str.isprintable, last))[-_MAX_NAME:] or "picture"


def data_url(picture: Image.Image) -> str:
    """An RGB picture as a JPEG in a URL, made smaller if it is large."""
    picture.thumbnail((MAX_SHOWN_SIDE, MAX_SHOWN_SIDE))
    content = encode_image(picture, "JPEG", quality=92, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(content).decode()


def describe_skeleton(metadata: Metadata | None) -> list[dict[str, Any]]:
    """The bones that :class:`lsnet_d2.drawing.LandmarkPainter` draws.

    Returns:
        For JSON. ``ends`` are two lists of names of keypoints, whose middle is meant, and ``color``
        is as in CSS.
    """
    bones = skeleton_bones(Metadata() if metadata is None else metadata)
    return [
        {"ends": [list(first), list(second)], "color": matplotlib.colors.to_hex(color)}
        for first, second, color in bones
    ]

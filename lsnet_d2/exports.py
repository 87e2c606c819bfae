"""Detections as pictures and in the formats of other programs: COCO's results, labelme, GeoJSON."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from PIL import Image

from .data.catalog import class_name
from .data.images import ImageError, ImageLike, load_image
from .data.keypoints import known_keypoint_names
from .data.polygons import mask_to_polygons, polygons_to_rle, signed_area
from .drawing import KEYPOINT_THRESHOLD
from .errors import UserError
from .visualizer import LSNetVisualizer

# What of an object is written, and the fields that it is taken from, the first that there is.
PARTS = {
    "box": ("pred_boxes",),
    "contour": ("pred_contours", "pred_masks"),
    "keypoints": ("pred_keypoints",),
}

# The scores by which COCO's tasks rank detections, in ``Instances`` and in results; others take the
# detection's.
SCORE_KEYS = {
    "segm": ("contour_scores", "contour_score"),
    "keypoints": ("pose_scores", "pose_score"),
}

# Coordinates that COCO's results have besides its own, and to how many decimals.
RESULT_KEYS = {"pred_extreme_points": ("extreme_points", None), "pred_contours": ("contour", 2)}

LABELME_VERSION = "5.5.0"  # the format has been the same since 5.0
_DECIMALS = 2  # of coordinates that are not COCO's


def coco_results(instances: Instances, image_id: int) -> list[dict[str, Any]]:
    """Detections of an image as COCO has them, with the model's classes for categories.

    Contours are RLEs under ``segmentation``, which are made without drawing them. Keypoints are
    0.5 less than in ``instances``, which stay as they are: COCO's are indices of pixels.

    Args:
        instances: with the fields that a model predicts, in pixels of the image.
    """
    instances = instances.to("cpu")  # another object: its fields can be replaced
    contours = instances.pred_contours.float() if instances.has("pred_contours") else None
    if contours is not None and instances.has("pred_masks"):
        instances.remove("pred_masks")  # the same, as bitmaps
    if instances.has("pred_keypoints"):
        instances.pred_keypoints = instances.pred_keypoints.clone()  # shifted in place
    results = instances_to_coco_json(instances, image_id)
    for name, key in SCORE_KEYS.values():
        if instances.has(name):
            for result, score in zip(results, instances.get(name).tolist(), strict=True):
                result[key] = score
    if contours is not None:
        rles = polygons_to_rle(contours.numpy(), *instances.image_size)
        for result, rle in zip(results, rles, strict=True):
            result["segmentation"] = rle
    return results


def landmark_columns(landmarks: Mapping[str, torch.Tensor]) -> dict[str, list]:
    """The landmarks of all detections of an image under the keys of :data:`RESULT_KEYS`.

    Args:
        landmarks: (N, ..., 2) by their fields in ``Instances``; others than those of the table
            are left out.
    """
    columns = {}
    for name, (key, decimals) in RESULT_KEYS.items():
        if name in landmarks:
            points = landmarks[name].numpy().astype(np.float64)
            columns[key] = (points if decimals is None else points.round(decimals)).tolist()
    return columns


def with_category_ids(results: list[dict[str, Any]], metadata: Metadata) -> list[dict[str, Any]]:
    """COCO's results with the annotation file's ids of classes in place of the model's.

    They stay as they are where there is no such file.

    Raises:
        UserError: the file has fewer classes than the model.
    """
    contiguous = metadata.get("thing_dataset_id_to_contiguous_id")
    if not contiguous:
        return results
    ids = {index: identity for identity, index in contiguous.items()}
    unknown = {result["category_id"] for result in results} - ids.keys()
    if unknown:
        raise UserError(
            f"the model predicts class {min(unknown)}, but data set "
            f"{metadata.get('name', 'of the metadata')} has classes 0 to {max(ids)}"
        )
    return [{**result, "category_id": ids[result["category_id"]]} for result in results]


@dataclass(frozen=True)
class _Detection:
    """Points (n, 2) in pixels of the image."""

    label: str
    score: float
    box: np.ndarray | None = None  # two corners
    outlines: list[np.ndarray] = field(default_factory=list)
    keypoints: dict[str, tuple[float, float, float]] = field(default_factory=dict)


class Results(Instances):
    """The detections of one image, which can be drawn and written for other programs.

    :class:`lsnet_d2.LSNetPredictor` returns them. They are Detectron2's ``Instances``, and stay
    ``Results`` when indexed: ``results[results.scores > 0.5].to_geojson()``.

    Examples:
        >>> results = LSNetPredictor("model_final.pth")("photo.jpg")
        >>> results.draw().save("found.jpg")
        >>> json.dump(results.to_labelme(parts=["contour"]), file)
    """

    def __init__(
        self,
        instances: Instances,
        *,
        metadata: Metadata | None = None,
        file_name: str | os.PathLike | None = None,
        array_format: str = "BGR",
    ) -> None:
        """
        Args:
            instances: with the fields that a model predicts, in pixels of the image. The fields
                are shared.
            metadata: of the data set, with the names of classes and keypoints and the ids of
                categories; what it does not know is a number, counted from 0.
            file_name: of the image; None where it is in memory.
            array_format: "BGR" or "RGB", the order of the channels of an array that :meth:`draw`
                is given.
        """
        super().__init__(instances.image_size, **instances.get_fields())
        # Instances takes a name without an underscore for a field
        self._metadata = metadata
        self._file_name = None if file_name is None else os.fspath(file_name)
        self._array_format = array_format

    @property
    def metadata(self) -> Metadata | None:
        return self._metadata

    @property
    def file_name(self) -> str | None:
        return self._file_name

    def to(self, *args: Any, **kwargs: Any) -> "Results":
        return self._with_fields_of(super().to(*args, **kwargs))

    def __getitem__(self, item: int | slice | torch.Tensor) -> "Results":
        return self._with_fields_of(super().__getitem__(item))

    def _with_fields_of(self, instances: Instances) -> "Results":
        return Results(
            instances,
            metadata=self._metadata,
            file_name=self._file_name,
            array_format=self._array_format,
        )

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """A list as pycocotools' ``loadRes`` takes it, and as evaluation writes it to its file.

        Args:
            image_id: of the image in the annotation file.

        Raises:
            UserError: the metadata have fewer classes than the model.
        """
        instances = self.to("cpu")
        landmarks = {
            name: instances.get(name).float() for name in RESULT_KEYS if instances.has(name)
        }
        columns = landmark_columns(landmarks)
        results = with_category_ids(coco_results(instances, image_id), self._known())
        for index, result in enumerate(results):
            result.update({key: points[index] for key, points in columns.items()})
        return results

    def to_labelme(
        self,
        *,
        parts: Sequence[str] | None = None,
        keypoint_threshold: float = KEYPOINT_THRESHOLD,
        image_path: str | None = None,
    ) -> dict[str, Any]:
        """A file of labelme 5: boxes as rectangles, contours as polygons, keypoints as points.

        The shapes of an object have its index for ``group_id``, and its score for a description.

        Args:
            parts: which of :data:`PARTS`; None: those that there are.
            keypoint_threshold: keypoints are written above this score.
            image_path: where labelme finds the image, from the folder of the labelme file. None:
                beside it, under the name of its file.

        Raises:
            ValueError: a part is unknown, or the detections do not have it; or ``image_path`` is
                needed, as the image is of no file.
            UserError: the metadata name another number of keypoints.
        """
        if image_path is None:
            if self._file_name is None:
                raise ValueError("the image is of no file: give the image_path that it will have")
            image_path = os.path.basename(self._file_name)
        height, width = self.image_size
        shapes = []
        for index, found in enumerate(self._detections(parts, keypoint_threshold)):
            drawn = [] if found.box is None else [("rectangle", found.label, found.box)]
            drawn += [("polygon", found.label, outline) for outline in found.outlines]
            drawn += [
                ("point", name, np.array([[x, y]])) for name, (x, y, _) in found.keypoints.items()
            ]
            shapes += [
                {
                    "label": label,
                    "points": _rounded(points),
                    "group_id": index,
                    "description": f"{found.score:.3f}",
                    "shape_type": shape_type,
                    "flags": {},
                    "mask": None,
                }
                for shape_type, label, points in drawn
            ]
        return {
            "version": LABELME_VERSION,
            "flags": {},
            "shapes": shapes,
            "imagePath": image_path,
            "imageData": None,
            "imageHeight": height,
            "imageWidth": width,
        }

    def to_geojson(
        self,
        *,
        parts: Sequence[str] | None = None,
        keypoint_threshold: float = KEYPOINT_THRESHOLD,
    ) -> dict[str, Any]:
        """A ``FeatureCollection`` with one feature for each part of an object: boxes and contours
        are Polygons (the regions of a mask a MultiPolygon, without holes), keypoints MultiPoints.

        Coordinates are pixels of the image, x to the right and y *down*, as QuPath takes them; not
        longitude and latitude, which the standard (RFC 7946) has. Rings are closed, and
        counter-clockwise as it demands, by the sign of the area that their numbers give; on a
        screen, where y points down, they run clockwise.

        Args:
            parts, keypoint_threshold: see :meth:`to_labelme`.

        Raises:
            ValueError: a part is unknown, or the detections do not have it.
            UserError: the metadata name another number of keypoints.
        """
        features = []
        for index, found in enumerate(self._detections(parts, keypoint_threshold)):
            about = {"object": index, "class": found.label, "score": round(found.score, 4)}
            geometries = []
            if found.box is not None:
                (x0, y0), (x1, y1) = found.box
                corners = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
                geometries.append(("box", "Polygon", [_ring(corners)], {}))
            rings = [[_ring(outline)] for outline in found.outlines]
            if len(rings) == 1:
                geometries.append(("contour", "Polygon", rings[0], {}))
            elif rings:
                geometries.append(("contour", "MultiPolygon", rings, {}))
            if found.keypoints:
                values = np.array(list(found.keypoints.values()))
                more = {"names": list(found.keypoints), "scores": values[:, 2].round(4).tolist()}
                geometries.append(("keypoints", "MultiPoint", _rounded(values[:, :2]), more))
            features += [
                {
                    "type": "Feature",
                    "geometry": {"type": kind, "coordinates": coordinates},
                    "properties": {**about, "part": part, **more},
                }
                for part, kind, coordinates, more in geometries
            ]
        return {"type": "FeatureCollection", "features": features}

    def draw(
        self,
        image: ImageLike | None = None,
        *,
        identities: Sequence[int] | None = None,
        **style: Any,
    ) -> Image.Image:
        """A picture of the detections, of the image's size or enlarged.

        Args:
            image: as the predictor takes it; None: that of ``file_name``.
            identities: see :meth:`LSNetVisualizer.draw_instance_predictions`.
            style: of :class:`lsnet_d2.visualizer.LSNetVisualizer`.

        Raises:
            ImageError: the image cannot be read, or is of another size.
            UserError: the metadata name another number of keypoints.
            ValueError: ``image`` is needed, as there is no file of it.
        """
        if image is None:
            if self._file_name is None:
                raise ValueError("the image is of no file: give the image to draw on")
            image = self._file_name
        pixels = load_image(image, "RGB", array_format=self._array_format)
        (height, width), (own_height, own_width) = pixels.shape[:2], self.image_size
        if (height, width) != (own_height, own_width):
            raise ImageError(
                f"the image to draw on has {width} x {height} pixels, but the detections are of "
                f"one with {own_width} x {own_height}"
            )
        visualizer = LSNetVisualizer(pixels, self._metadata, **style)
        drawn = visualizer.draw_instance_predictions(self, identities=identities)
        return Image.fromarray(drawn.get_image())

    def _known(self) -> Metadata:
        return Metadata() if self._metadata is None else self._metadata

    def _field_names(self, parts: Sequence[str] | None) -> dict[str, str]:
        """The field of each part that is to be written."""
        there = {
            part: next(filter(self.has, names))
            for part, names in PARTS.items()
            if any(map(self.has, names))
        }
        for part in parts or ():
            if part not in there:
                raise ValueError(f"part {part!r}: the detections have {', '.join(there)}")
        return {part: there[part] for part in (there if parts is None else parts)}

    def _detections(
        self, parts: Sequence[str] | None, keypoint_threshold: float
    ) -> Iterator[_Detection]:
        fields = self._field_names(parts)
        instances, metadata = self.to("cpu"), self._known()
        classes = instances.pred_classes.tolist()
        for index, (label, score) in enumerate(
            zip(classes, instances.scores.tolist(), strict=True)
        ):
            values: dict[str, Any] = {}
            if "box" in fields:
                values["box"] = instances.pred_boxes.tensor[index].numpy().reshape(2, 2)
            if "contour" in fields:
                contour = instances.get(fields["contour"])[index].numpy()
                is_mask = fields["contour"] == "pred_masks"
                values["outlines"] = mask_to_polygons(contour) if is_mask else [contour]
            if "keypoints" in fields:
                points = instances.pred_keypoints[index].tolist()
                names = known_keypoint_names(metadata, len(points)) or range(len(points))
                values["keypoints"] = {
                    str(name): tuple(point)
                    for name, point in zip(names, points, strict=True)
                    if point[2] > keypoint_threshold
                }
            yield _Detection(label=class_name(metadata, label), score=score, **values)


def _rounded(points: np.ndarray) -> list[list[float]]:
    return points.astype(np.float64).round(_DECIMALS).tolist()


def _ring(polygon: np.ndarray) -> list[list[float]]:
    """A polygon (n, 2) as RFC 7946 has exterior rings: closed, with a positive area."""
    polygon = polygon.astype(np.float64)
    points = _rounded(polygon if signed_area(polygon) >= 0 else polygon[::-1])
    return [*points, points[0]]

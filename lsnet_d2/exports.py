"""Detections in the formats of other programs: COCO's results, labelme, GeoJSON."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances

from .data.images import read_image
from .data.polygons import mask_to_polygons, polygons_to_rle, signed_area
from .visualizer import LSNetVisualizer

# What of an object is written, and the fields that it is taken from, the first that there is.
PARTS = {
    "box": ("pred_boxes",),
    "contour": ("pred_contours", "pred_masks"),
    "keypoints": ("pred_keypoints",),
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


def category_ids(metadata: Metadata | None) -> dict[int, int] | None:
    """The annotation file's id of each class of the model; None where there is no such file."""
    contiguous = metadata and metadata.get("thing_dataset_id_to_contiguous_id")
    return contiguous and {index: identity for identity, index in contiguous.items()}


@dataclass(frozen=True)
class _Detection:
    """Points (n, 2) in pixels of the image."""

    label: str
    score: float
    box: np.ndarray | None = None  # two corners
    outlines: list[np.ndarray] = field(default_factory=list)
    keypoints: dict[str, tuple[float, float, float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Results:
    """The detections of one image, for other programs.

    Attributes:
        instances: what :class:`lsnet_d2.LSNetPredictor` returns for the image.
        metadata: of the data set, with the names of classes and keypoints and the ids of
            categories; what it does not know is a number, counted from 0.
        file_name: of the image.

    Examples:
        >>> predict = LSNetPredictor("config.yaml", weights="model_final.pth")
        >>> results = Results(
        ...     instances=predict("photo.jpg"), metadata=predict.metadata, file_name="photo.jpg"
        ... )
        >>> json.dump(results.to_labelme(parts=["contour"]), file)
    """

    instances: Instances
    metadata: Metadata | None = None
    file_name: str | os.PathLike = ""

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """A list as pycocotools' ``loadRes`` takes it, and as evaluation writes it to its file.

        Args:
            image_id: of the image in the annotation file.
        """
        instances = self.instances.to("cpu")
        landmarks = {
            name: instances.get(name).float() for name in RESULT_KEYS if instances.has(name)
        }
        columns = landmark_columns(landmarks)
        ids = category_ids(self.metadata)
        results = coco_results(instances, image_id)
        for index, result in enumerate(results):
            if ids:
                result["category_id"] = ids[result["category_id"]]
            result.update({key: points[index] for key, points in columns.items()})
        return results

    def to_labelme(
        self, *, parts: Sequence[str] | None = None, keypoint_threshold: float = 0.05
    ) -> dict[str, Any]:
        """A file of labelme 5: boxes as rectangles, contours as polygons, keypoints as points.

        The shapes of an object have its index for ``group_id``, and its score for a description.
        Labelme finds the image by ``imagePath``, which is ``file_name`` as it is: it starts from
        the folder of the labelme file.

        Args:
            parts: which of :data:`PARTS`; None: those that there are.
            keypoint_threshold: lowest score of a keypoint.

        Raises:
            ValueError: a part is unknown, or the detections do not have it.
        """
        height, width = self.instances.image_size
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
            "imagePath": os.fspath(self.file_name),
            "imageData": None,
            "imageHeight": height,
            "imageWidth": width,
        }

    def to_geojson(
        self, *, parts: Sequence[str] | None = None, keypoint_threshold: float = 0.05
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
            ValueError: see :meth:`to_labelme`.
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

    def draw(self, image: np.ndarray | None = None, **style: Any) -> np.ndarray:
        """A picture of the detections, RGB, of the image's size or enlarged.

        Args:
            image: (H, W, 3) RGB; None: that of ``file_name``.
            style: of :class:`lsnet_d2.visualizer.LSNetVisualizer`.

        Raises:
            ImageError: the file cannot be read.
        """
        if image is None:
            image = read_image(os.fspath(self.file_name), "RGB")
        visualizer = LSNetVisualizer(image, self.metadata, **style)
        return visualizer.draw_instance_predictions(self.instances).get_image()

    def _fields(self, parts: Sequence[str] | None) -> dict[str, str]:
        """The field of each part that is to be written."""
        there = {
            part: next(filter(self.instances.has, names))
            for part, names in PARTS.items()
            if any(map(self.instances.has, names))
        }
        for part in parts or ():
            if part not in there:
                raise ValueError(f"part {part!r}: the detections have {', '.join(there)}")
        return {part: there[part] for part in (there if parts is None else parts)}

    def _names(self, key: str, count: int) -> list[str]:
        names = self.metadata.get(key) if self.metadata else None
        return [str(name) for name in names or range(count)]

    def _detections(
        self, parts: Sequence[str] | None, keypoint_threshold: float
    ) -> Iterator[_Detection]:
        fields = self._fields(parts)
        instances = self.instances.to("cpu")
        classes = instances.pred_classes.tolist()
        labels = self._names("thing_classes", max(classes, default=-1) + 1)
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
                names = self._names("keypoint_names", len(points))
                values["keypoints"] = {
                    name: tuple(point)
                    for name, point in zip(names, points, strict=True)
                    if point[2] >= keypoint_threshold
                }
            yield _Detection(label=labels[label], score=score, **values)


def _rounded(points: np.ndarray) -> list[list[float]]:
    return points.astype(np.float64).round(_DECIMALS).tolist()


def _ring(polygon: np.ndarray) -> list[list[float]]:
    """A polygon (n, 2) as RFC 7946 has exterior rings: closed, with a positive area."""
    polygon = polygon.astype(np.float64)
    points = _rounded(polygon if signed_area(polygon) >= 0 else polygon[::-1])
    return [*points, points[0]]

"""Pictures of predictions and ground truth: boxes, extreme points, contours, masks, keypoints."""

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.colors
import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, Keypoints, PolygonMasks
from detectron2.utils.visualizer import ColorMode, VisImage
from matplotlib.patches import Rectangle

from .data.annotation_checks import AnnotationError, name_annotation
from .data.catalog import class_name
from .data.extreme_points import as_extreme_points
from .data.polygons import check_form, decode_rle
from .drawing import LandmarkPainter, Region

# Bright and unlike each other, also next to each other on a photo.
PALETTE = [
    (0.90, 0.10, 0.29),
    (0.24, 0.71, 0.29),
    (1.00, 0.88, 0.10),
    (0.26, 0.56, 1.00),
    (0.96, 0.51, 0.19),
    (0.80, 0.35, 0.95),
    (0.27, 0.94, 0.94),
    (0.94, 0.20, 0.90),
    (0.74, 0.96, 0.05),
    (0.98, 0.75, 0.75),
    (0.10, 0.75, 0.65),
    (0.90, 0.75, 1.00),
]


class LSNetVisualizer(LandmarkPainter):
    """Detectron2's visualizer that draws LSNet's landmarks and fits its lines to the picture.

    What is drawn follows from the fields that there are; everything of an object has its colour:

    - The extreme points are dots joined to a quadrilateral (top, left, bottom, right), or dots
      only where the object's contour or mask is drawn.
    - A contour is a closed line, filled or not. Its vertices are dots where there is room for them.
      It stands in for the object's mask, of which it is the outline.
    - Keypoints are dots, joined by the ``keypoint_connection_rules`` of the metadata, in the
      colours that these give. Annotated ones that are hidden are hollow.
    - Class and score stand on top of the box.

    Colours go by instance in the order of the input, or with ``ColorMode.SEGMENTATION`` by class.
    All coordinates are pixels of the input image.
    """

    def draw_instance_predictions(
        self,
        predictions: Instances,
        jittering: bool = False,
        *,
        identities: Sequence[int] | None = None,
    ) -> VisImage:
        """Draw what the fields ``pred_boxes``, ``pred_classes``, ``scores``,
        ``pred_extreme_points``, ``pred_contours`` or else ``pred_masks``, and ``pred_keypoints``
        hold, as far as they exist.

        Args:
            predictions: on any device.
            jittering: has no effect; colours are the same in every run.
            identities: a number for each object, which chooses its colour in place of its index
                (see :mod:`lsnet_d2.tracking`).

        Raises:
            UserError: the metadata name another number of keypoints.
        """
        return self._draw(predictions.to("cpu"), "pred_", identities)

    def draw_ground_truth(self, instances: Instances) -> VisImage:
        """Draw what a mapper gives: ``gt_boxes``, ``gt_classes``, ``gt_extreme_points``,
        ``gt_contours`` or else ``gt_masks``, and ``gt_keypoints``, as far as they exist.

        Raises:
            UserError: the metadata name another number of keypoints.
        """
        return self._draw(instances.to("cpu"), "gt_")

    def draw_dataset_dict(self, dic: dict) -> VisImage:
        """Draw the annotations of a dict in Detectron2's standard format, each with what it has of
        ``segmentation``, ``keypoints`` and ``extreme_points``.

        Raises:
            AnnotationError: a segmentation is malformed or of another size than the image, or
                keypoints or extreme points are malformed.
            UserError: the metadata name another number of keypoints.
        """
        annotations = dic.get("annotations", [])
        if not annotations:
            return self.output

        def column(key: str, convert: Callable[[Any], Any]) -> list:
            values = []
            for index, annotation in enumerate(annotations):
                value = annotation.get(key)
                try:
                    empty = value is None or not len(value)
                    values.append(None if empty else convert(value))
                except (TypeError, ValueError) as error:
                    name = name_annotation(dic, index)
                    raise AnnotationError(f"{name}: its {key!r}: {error}") from error
            return values

        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
        classes = [a["category_id"] for a in annotations]
        return self._overlay(
            colors=[self._color(index, label) for index, label in enumerate(classes)],
            labels=[
                self._label(c, crowd=bool(a.get("iscrowd")))
                for c, a in zip(classes, annotations, strict=True)
            ],
            boxes=np.asarray(boxes, dtype=float).reshape(-1, 4),
            regions=column("segmentation", self._to_region),
            keypoints=column("keypoints", lambda v: np.array(v, dtype=float).reshape(-1, 3)),
            annotated=True,
            extreme_points=column("extreme_points", as_extreme_points),
        )

    def draw_ignored(self, boxes: Boxes | np.ndarray) -> VisImage:
        """Draw regions (N, 4) XYXY that are neither object nor background, in dashed grey."""
        boxes = boxes.tensor.cpu() if isinstance(boxes, Boxes) else boxes
        for box in np.asarray(boxes):
            self.draw_box(box, alpha=0.9, edge_color="lightgrey", line_style="--")
        return self.output

    def draw_box(
        self,
        box_coord: tuple,
        alpha: float = 0.9,
        edge_color: Any = "g",
        line_style: str = "-",
    ) -> VisImage:
        x0, y0, x1, y1 = box_coord
        self.output.ax.add_patch(
            Rectangle(
                (x0, y0),
                x1 - x0,
                y1 - y0,
                fill=False,
                edgecolor=edge_color,
                linewidth=self._line_width,
                alpha=alpha,
                linestyle=line_style,
            )
        )
        return self.output

    def _to_region(self, segmentation: Any) -> Region | None:
        """
        Raises:
            ValueError: see :func:`lsnet_d2.data.polygons.segmentation_to_polygons`.
        """
        if isinstance(segmentation, dict):
            return _mask_region(decode_rle(segmentation, self.output.height, self.output.width))
        check_form(segmentation, image_size=None)
        parts = [np.asarray(part, dtype=float).reshape(-1, 2) for part in segmentation]
        return [part for part in parts if len(part) >= 3]

    def _to_regions(self, masks: Any) -> list[Region | None]:
        if isinstance(masks, PolygonMasks):
            return [self._to_region(parts) for parts in masks.polygons]
        masks = masks.tensor if isinstance(masks, BitMasks) else masks
        return [_mask_region(mask) for mask in np.asarray(masks)]

    def _draw(
        self, instances: Instances, prefix: str, identities: Sequence[int] | None = None
    ) -> VisImage:
        def field(name: str) -> Any:
            return instances.get(prefix + name) if instances.has(prefix + name) else None

        def array(name: str) -> np.ndarray | None:
            value = field(name)
            value = value.tensor if isinstance(value, Keypoints) else value
            return value.detach().numpy() if isinstance(value, torch.Tensor) else value

        classes = field("classes")
        classes = classes.tolist() if classes is not None else [None] * len(instances)
        scores = instances.scores.tolist() if instances.has("scores") else [None] * len(instances)
        indices = range(len(instances)) if identities is None else identities
        contours, masks = array("contours"), field("masks")
        return self._overlay(
            colors=[self._color(i, c) for i, c in zip(indices, classes, strict=True)],
            labels=[self._label(c, score=score) for c, score in zip(classes, scores, strict=True)],
            boxes=field("boxes"),
            contours=contours,
            regions=None if masks is None or contours is not None else self._to_regions(masks),
            keypoints=array("keypoints"),
            annotated=prefix == "gt_",
            extreme_points=array("extreme_points"),
        )

    def _overlay(
        self,
        *,
        colors: list,
        labels: list[str],
        boxes: Boxes | np.ndarray | None,
        contours: np.ndarray | None = None,
        regions: list[Region | None] | None = None,
        keypoints: Sequence[np.ndarray | None] | None,
        annotated: bool,
        extreme_points: Sequence[np.ndarray | None] | None,
    ) -> VisImage:
        if contours is not None:
            self.overlay_contours(contours, colors)
        if regions is not None:
            self.overlay_regions(regions, colors)
        if boxes is not None:
            boxes = boxes.tensor.detach().numpy() if isinstance(boxes, Boxes) else boxes
            for box, color in zip(boxes, colors, strict=True):
                self.draw_box(box, edge_color=color)
            self._draw_labels(boxes, labels, colors)
        if keypoints is not None:
            self.overlay_keypoints(keypoints, colors, annotated=annotated)
        if extreme_points is not None:
            outlined = contours if contours is not None else regions or [None] * len(colors)
            joined = [region is None or not len(region) for region in outlined]
            self.overlay_extreme_points(extreme_points, colors, joined=joined)
        return self.output

    def _draw_labels(self, boxes: np.ndarray, labels: list[str], colors: list) -> None:
        """Texts on top of the boxes: Detectron2 has them inside, where they hide landmarks."""
        side = (self.output.height * self.output.width) ** 0.5
        for (x0, y0, _, y1), label, color in zip(boxes, labels, colors, strict=True):
            # Detectron2's sizes: small objects have smaller labels
            size = np.interp((y1 - y0) / side, [0.036, 0.1], [0.6, 1.0]) * self._default_font_size
            height = 1.5 * size * self.output.scale / self._points_per_pixel
            self.draw_text(
                label,
                (x0, max(0, y0 - height)),
                font_size=size,
                color=0.4 * np.array(matplotlib.colors.to_rgb(color)) + 0.6,
                horizontal_alignment="left",
            )

    def _color(self, index: int, label: int | None) -> tuple[float, ...]:
        if self._instance_mode != ColorMode.SEGMENTATION or label is None:
            return PALETTE[index % len(PALETTE)]
        thing_colors = self.metadata.get("thing_colors")
        if thing_colors:
            return tuple(value / 255 for value in thing_colors[label])
        return PALETTE[label % len(PALETTE)]

    def _label(self, label: int | None, *, score: float | None = None, crowd: bool = False) -> str:
        parts = []
        if label is not None:
            parts.append(class_name(self.metadata, label))
        if score is not None:
            parts.append(f"{score:.0%}")
        return " ".join(parts) + ("|crowd" if crowd else "")


def _mask_region(mask: np.ndarray) -> np.ndarray | None:
    return mask if mask.any() else None


def side_by_side(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Two pictures (H, W, 3) of the same height with a white bar between them."""
    bar = np.full((left.shape[0], max(4, left.shape[1] // 100), 3), 255, dtype=left.dtype)
    return np.concatenate([left, bar, right], axis=1)

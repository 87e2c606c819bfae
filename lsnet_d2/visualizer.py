"""Pictures of predictions and ground truth: boxes, extreme points, contours, masks, keypoints."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import matplotlib.colors
import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, Keypoints, PolygonMasks
from detectron2.utils.visualizer import ColorMode, VisImage, Visualizer
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.patheffects import withStroke

from .data.annotation_checks import AnnotationError, name_annotation
from .data.extreme_points import as_extreme_points
from .data.images import read_image
from .data.polygons import decode_rle
from .errors import UserError

# Small pictures are enlarged to this many pixels along their longer side.
MIN_LONG_SIDE = 640

CONTOUR_STYLES = ("filled", "outlined")

# People's trunk: the middles of these keypoints in a row.
TRUNK = (("nose",), ("left_shoulder", "right_shoulder"), ("left_hip", "right_hip"))
TRUNK_COLOR = (1.0, 0.5, 0.0)

# What an object covers: parts, each a polygon (n, 2); or a mask (H, W) of 0 and 1.
Region = list[np.ndarray] | np.ndarray

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


class LSNetVisualizer(Visualizer):
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

    def __init__(
        self,
        img_rgb: np.ndarray,
        metadata: Any = None,
        scale: float | None = None,
        instance_mode: ColorMode = ColorMode.IMAGE,
        font_size_scale: float = 1.0,
        *,
        contours: str = "filled",
        keypoint_threshold: float = 0.05,
    ) -> None:
        """
        Args:
            img_rgb: (H, W, 3), RGB in [0, 255].
            metadata: of the data set, for the names and colours of classes, and the skeleton.
            scale: size of the output relative to the input. None: small images are enlarged to
                MIN_LONG_SIDE, others are kept.
            contours: one of CONTOUR_STYLES, for contours and masks.
            keypoint_threshold: predicted keypoints are drawn above this score (Detectron2's 0.05).

        Raises:
            ValueError: ``contours`` is no style.
        """
        if contours not in CONTOUR_STYLES:
            raise ValueError(f"contours must be one of {CONTOUR_STYLES}, got {contours!r}")
        long_side = max(img_rgb.shape[:2])
        if scale is None:
            scale = max(1.0, MIN_LONG_SIDE / long_side)
        super().__init__(img_rgb, metadata, scale, instance_mode, font_size_scale)
        self.contours = contours
        self.keypoint_threshold = keypoint_threshold
        # Lengths on paper grow slowly with the size of the output. Detectron2 multiplies the
        # size of text by the scale again; its own default leaves no room on a small image.
        growth = (long_side * scale / MIN_LONG_SIDE) ** 0.5
        self._default_font_size = 10.0 * growth * font_size_scale / scale
        self._line_width = 1.5 * growth
        # nothing that is drawn may move the borders of the picture
        self.output.ax.autoscale(False)

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
            AnnotationError: a mask is damaged or of another size than the image, or the extreme
                points are not four or five.
            UserError: the metadata name another number of keypoints.
        """
        annotations = dic.get("annotations", [])
        if not annotations:
            return self.output
        regions: list[Region | None] = []
        extreme_points: list[np.ndarray | None] = []
        for index, annotation in enumerate(annotations):
            points = annotation.get("extreme_points")
            try:
                regions.append(self._to_region(annotation.get("segmentation")))
                extreme_points.append(as_extreme_points(points) if points is not None else None)
            except ValueError as error:
                raise AnnotationError(f"{name_annotation(dic, index)}: {error}") from error

        def column(key: str, shape: tuple[int, int]) -> list[np.ndarray | None]:
            values = [a.get(key) for a in annotations]
            return [np.array(v, dtype=float).reshape(shape) if v else None for v in values]

        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
        classes = [a["category_id"] for a in annotations]
        return self._overlay(
            colors=[self._color(index, label) for index, label in enumerate(classes)],
            labels=[
                self._label(c, crowd=bool(a.get("iscrowd")))
                for c, a in zip(classes, annotations, strict=True)
            ],
            boxes=np.asarray(boxes, dtype=float).reshape(-1, 4),
            regions=regions,
            keypoints=column("keypoints", (-1, 3)),
            annotated=True,
            extreme_points=extreme_points,
        )

    def draw_ignored(self, boxes: Boxes | np.ndarray) -> VisImage:
        """Draw regions (N, 4) XYXY that are neither object nor background, in dashed grey."""
        boxes = boxes.tensor.cpu() if isinstance(boxes, Boxes) else boxes
        for box in np.asarray(boxes):
            self.draw_box(box, alpha=0.9, edge_color="lightgrey", line_style="--")
        return self.output

    def overlay_extreme_points(
        self, points: Sequence[np.ndarray | None], colors: list, *, joined: bool | list[bool] = True
    ) -> VisImage:
        """Draw dots, and quadrilaterals with their corners there.

        Args:
            points: N of (4, 2) as x, y: top, left, bottom, right. None draws nothing.
            colors: N colours of matplotlib.
            joined: whether to draw the quadrilaterals; for all, or for each.
        """
        joined = [joined] * len(points) if isinstance(joined, bool) else joined
        for corners, color, lines in zip(points, colors, joined, strict=True):
            if corners is None:
                continue
            closed = np.concatenate([corners, corners[:1]])
            self.output.ax.add_line(
                Line2D(
                    closed[:, 0],
                    closed[:, 1],
                    color=color,
                    linestyle="-" if lines else "none",
                    linewidth=0.6 * self._line_width,
                    marker="o",
                    markersize=2.8 * self._line_width,
                    markeredgecolor="white",
                    markeredgewidth=0.4 * self._line_width,
                    zorder=5,
                )
            )
        return self.output

    def overlay_contours(self, contours: Sequence[np.ndarray], colors: list) -> VisImage:
        """Draw closed contours, with dots at the vertices where these stand apart on the output.

        Args:
            contours: N of (P, 2) as x, y, the first point not repeated.
            colors: N colours of matplotlib.
        """
        self.overlay_regions([[contour] for contour in contours], colors)
        size = 1.5 * self._line_width
        for contour, color in zip(contours, colors, strict=True):
            steps = np.linalg.norm(contour - np.roll(contour, 1, axis=0), axis=1)
            if steps.mean() * self._points_per_pixel < 4 * size:
                continue
            self.output.ax.add_line(
                Line2D(
                    contour[:, 0],
                    contour[:, 1],
                    linestyle="none",
                    marker="o",
                    markersize=size,
                    color=color,
                    markeredgecolor="white",
                    markeredgewidth=0.2 * self._line_width,
                    zorder=3,
                )
            )
        return self.output

    def overlay_regions(self, regions: Sequence[Region | None], colors: list) -> VisImage:
        """Draw masks or polygons in the style of contours, the smaller ones on top.

        Args:
            regions: N. None draws nothing.
            colors: N colours of matplotlib.
        """
        drawn = [
            (_extent(region), region, color)
            for region, color in zip(regions, colors, strict=True)
            if region is not None and len(region)
        ]
        for _, region, color in sorted(drawn, key=lambda item: -item[0]):
            if isinstance(region, np.ndarray):
                self._draw_mask(region, color)
            else:
                self._draw_polygons(region, color)
        return self.output

    def overlay_keypoints(
        self,
        keypoints: Sequence[np.ndarray | None],
        colors: list,
        *,
        annotated: bool = False,
    ) -> VisImage:
        """Draw the keypoints of several objects: see :meth:`draw_and_connect_keypoints`.

        Args:
            keypoints: N of (K, 3). None draws nothing.
            colors: N colours of matplotlib.
        """
        for points, color in zip(keypoints, colors, strict=True):
            if points is not None:
                self.draw_and_connect_keypoints(points, color, annotated=annotated)
        return self.output

    def draw_and_connect_keypoints(
        self, keypoints: np.ndarray, color: Any = "red", *, annotated: bool = False
    ) -> VisImage:
        """Draw an object's keypoints as dots and, where the metadata know them, its bones.

        Args:
            keypoints: (K, 3) as x, y, and a score, or with ``annotated`` COCO's visibility:
                0 is not drawn, 1 is hollow. Scores must be above ``keypoint_threshold``.
            color: of the dots.

        Raises:
            UserError: the metadata name another number of keypoints.
        """
        keypoints = np.asarray(keypoints, dtype=float)
        names = self.metadata.get("keypoint_names") or []
        if names and len(names) != len(keypoints):
            raise UserError(
                f"the metadata of {self.metadata.get('name', 'the data set')} name {len(names)} "
                f"keypoints, but an object has {len(keypoints)}"
            )
        drawn = keypoints[:, 2] > (0 if annotated else self.keypoint_threshold)
        if not drawn.any():
            return self.output
        # dots and bones of small objects would run into one blot
        extent = np.ptp(keypoints[drawn, :2], axis=0).max() * self._points_per_pixel
        width = self._line_width * np.clip(extent / (60 * self._line_width), 0.5, 1)

        joints = {name: keypoints[i, :2] for i, name in enumerate(names) if drawn[i]}
        for first, second, bone_color in self._bones(joints):
            self.output.ax.add_line(
                Line2D(
                    *zip(first, second, strict=True),
                    color=bone_color,
                    linewidth=width,
                    solid_capstyle="round",
                    path_effects=[withStroke(linewidth=1.8 * width, foreground="black", alpha=0.5)],
                    zorder=4,
                )
            )
        hidden = drawn & annotated & (keypoints[:, 2] == 1)
        # a hollow dot is wider: in its middle, the bone is to be seen
        for which, size, face, edge, edge_width in (
            (hidden, 3.2, "none", color, 0.6),
            (drawn & ~hidden, 2.6, color, "white", 0.4),
        ):
            self.output.ax.add_line(
                Line2D(
                    keypoints[which, 0],
                    keypoints[which, 1],
                    linestyle="none",
                    marker="o",
                    markersize=size * width,
                    markerfacecolor=face,
                    markeredgecolor=edge,
                    markeredgewidth=edge_width * width,
                    zorder=6,
                )
            )
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

    @property
    def _points_per_pixel(self) -> float:
        """Typographic points, matplotlib's unit of widths, per pixel of the input."""
        return self.output.scale * 72 / self.output.dpi

    def _bones(self, joints: dict[str, np.ndarray]) -> list[tuple]:
        """Ends (2,) and colours of the bones between joints that are drawn."""
        bones = [
            (joints[first], joints[second], tuple(value / 255 for value in color))
            for first, second, color in self.metadata.get("keypoint_connection_rules") or []
            if first in joints and second in joints
        ]
        # COCO's rules have no trunk. Detectron2 adds one to people, through the middles of the
        # shoulders and the hips; in the rules' colour of these here.
        if "nose" in (self.metadata.get("keypoint_names") or []):
            for ends in pairwise(TRUNK):
                if all(name in joints for names in ends for name in names):
                    middles = [np.mean([joints[n] for n in names], axis=0) for names in ends]
                    bones.append((*middles, TRUNK_COLOR))
        return bones

    def _draw_polygons(self, polygons: list[np.ndarray], color: Any) -> None:
        # the same sense of rotation makes parts that overlap one area
        parts = [p if _signed_area(p) > 0 else p[::-1] for p in polygons]
        outlines = [Path(np.concatenate([p, p[:1]]), closed=True) for p in parts]
        self.output.ax.add_patch(
            PathPatch(
                Path.make_compound_path(*outlines),
                facecolor=matplotlib.colors.to_rgba(color, self._fill_alpha),
                edgecolor=matplotlib.colors.to_rgba(color, 0.9),
                linewidth=0.8 * self._line_width,
                joinstyle="round",
            )
        )

    def _draw_mask(self, mask: np.ndarray, color: Any) -> None:
        """In contrast to Detectron2, holes stay open and the outline runs along the pixels'
        borders instead of through their centres."""
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        top, left = rows[0], columns[0]
        shown = np.pad(mask[top : rows[-1] + 1, left : columns[-1] + 1].astype(float), 1)
        # positions of the centres of pixels
        x, y = left - 0.5 + np.arange(shown.shape[1]), top - 0.5 + np.arange(shown.shape[0])
        axes = self.output.ax
        if self._fill_alpha:
            axes.contourf(x, y, shown, [0.5, 1.5], colors=[color], alpha=self._fill_alpha, zorder=1)
        axes.contour(
            x,
            y,
            shown,
            [0.5],
            colors=[color],
            alpha=0.9,
            linewidths=0.8 * self._line_width,
            zorder=1,
        )

    @property
    def _fill_alpha(self) -> float:
        return 0.35 if self.contours == "filled" else 0.0

    def _to_region(self, segmentation: Any) -> Region | None:
        """
        Raises:
            ValueError: see :func:`lsnet_d2.data.polygons.decode_rle`.
        """
        if isinstance(segmentation, dict):
            return _mask_region(decode_rle(segmentation, self.output.height, self.output.width))
        parts = [np.asarray(part, dtype=float).reshape(-1, 2) for part in segmentation or []]
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
        names = self.metadata.get("thing_classes") or []
        parts = []
        if label is not None:
            parts.append(names[label] if label < len(names) else str(label))
        if score is not None:
            parts.append(f"{score:.0%}")
        return " ".join(parts) + ("|crowd" if crowd else "")


def _mask_region(mask: np.ndarray) -> np.ndarray | None:
    return mask if mask.any() else None


def _extent(region: Region) -> float:
    """Area of the box around a region, pixels."""
    if isinstance(region, np.ndarray):
        return float(np.ptp(np.flatnonzero(region.any(axis=0))) + 1) * float(
            np.ptp(np.flatnonzero(region.any(axis=1))) + 1
        )
    return float(np.ptp(np.concatenate(region), axis=0).prod())


def _signed_area(polygon: np.ndarray) -> float:
    x, y = polygon.T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def read_rgb(path: str) -> np.ndarray:
    """An image file as (H, W, 3), RGB: see :func:`lsnet_d2.data.images.read_image`."""
    return read_image(path, "RGB")


def side_by_side(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Two pictures (H, W, 3) of the same height with a white bar between them."""
    bar = np.full((left.shape[0], max(4, left.shape[1] // 100), 3), 255, dtype=left.dtype)
    return np.concatenate([left, bar, right], axis=1)

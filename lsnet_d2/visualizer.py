"""Pictures of predictions and ground truth, with extreme points."""

from typing import Any

import numpy as np
from detectron2.data import detection_utils
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.visualizer import ColorMode, VisImage, Visualizer
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

# Small pictures are enlarged to this many pixels along their longer side.
MIN_LONG_SIDE = 640

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
    """Detectron2's visualizer, which also draws extreme points and fits its lines to the picture.

    The extreme points of an object are dots joined to a quadrilateral (top, left, bottom, right)
    in the colour of its box. Colours go by instance in the order of the input, or with
    ``ColorMode.SEGMENTATION`` by class. All coordinates are pixels of the input image.
    """

    def __init__(
        self,
        img_rgb: np.ndarray,
        metadata: Any = None,
        scale: float | None = None,
        instance_mode: ColorMode = ColorMode.IMAGE,
        font_size_scale: float = 1.0,
    ) -> None:
        """
        Args:
            img_rgb: (H, W, 3), RGB in [0, 255].
            metadata: of the data set, for the names and colours of classes.
            scale: size of the output relative to the input. None: small images are enlarged to
                MIN_LONG_SIDE, others are kept.
        """
        long_side = max(img_rgb.shape[:2])
        if scale is None:
            scale = max(1.0, MIN_LONG_SIDE / long_side)
        super().__init__(img_rgb, metadata, scale, instance_mode, font_size_scale)
        # Lengths on paper grow slowly with the size of the output. Detectron2 multiplies the
        # size of text by the scale again; its own default leaves no room on a small image.
        growth = (long_side * scale / MIN_LONG_SIDE) ** 0.5
        self._default_font_size = 10.0 * growth * font_size_scale / scale
        self._line_width = 1.5 * growth

    def draw_instance_predictions(
        self, predictions: Instances, jittering: bool = False
    ) -> VisImage:
        """Draw what the fields ``pred_boxes``, ``pred_classes``, ``scores``,
        ``pred_extreme_points``, ``pred_masks`` and ``pred_keypoints`` hold, as far as they exist.

        Args:
            predictions: on any device.
            jittering: has no effect; colours are the same in every run.
        """
        return self._draw(predictions.to("cpu"), "pred_")

    def draw_ground_truth(self, instances: Instances) -> VisImage:
        """Draw what a mapper gives: ``gt_boxes``, ``gt_classes``, ``gt_extreme_points``,
        ``gt_masks`` and ``gt_keypoints``, as far as they exist."""
        return self._draw(instances.to("cpu"), "gt_")

    def draw_dataset_dict(self, dic: dict) -> VisImage:
        """Draw the annotations of a dict in Detectron2's standard format. Extreme points are
        taken from ``extreme_points`` where all annotations have it."""
        annotations = dic.get("annotations", [])
        if not annotations:
            return self.output

        def column(key: str) -> list | None:
            return [a[key] for a in annotations] if all(key in a for a in annotations) else None

        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
        classes = column("category_id")
        keypoints, points = column("keypoints"), column("extreme_points")
        return self._overlay(
            classes=classes,
            labels=[
                self._label(c, crowd=bool(a.get("iscrowd")))
                for c, a in zip(classes, annotations, strict=True)
            ],
            boxes=np.asarray(boxes, dtype=float).reshape(-1, 4),
            masks=column("segmentation"),
            keypoints=keypoints and np.asarray(keypoints, dtype=float).reshape(len(boxes), -1, 3),
            extreme_points=points and np.asarray(points, dtype=float).reshape(-1, 4, 2),
        )

    def draw_ignored(self, boxes: Boxes | np.ndarray) -> VisImage:
        """Draw regions (N, 4) XYXY that are neither object nor background, in dashed grey."""
        boxes = boxes.tensor.cpu() if isinstance(boxes, Boxes) else boxes
        for box in np.asarray(boxes):
            self.draw_box(box, alpha=0.9, edge_color="lightgrey", line_style="--")
        return self.output

    def overlay_extreme_points(self, points: np.ndarray, colors: list) -> VisImage:
        """Draw quadrilaterals with dots at their corners.

        Args:
            points: (N, 4, 2) as x, y: top, left, bottom, right.
            colors: N colours of matplotlib.
        """
        for corners, color in zip(points, colors, strict=True):
            closed = np.concatenate([corners, corners[:1]])
            self.output.ax.add_line(
                Line2D(
                    closed[:, 0],
                    closed[:, 1],
                    color=color,
                    linewidth=0.6 * self._line_width,
                    marker="o",
                    markersize=2.8 * self._line_width,
                    markeredgecolor="white",
                    markeredgewidth=0.4 * self._line_width,
                    zorder=5,
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

    def _draw(self, instances: Instances, prefix: str) -> VisImage:
        def field(name: str) -> Any:
            return instances.get(prefix + name) if instances.has(prefix + name) else None

        classes = field("classes")
        classes = classes.tolist() if classes is not None else [None] * len(instances)
        scores = instances.scores.tolist() if instances.has("scores") else [None] * len(instances)
        points = field("extreme_points")
        masks = field("masks")
        return self._overlay(
            classes=classes,
            labels=[self._label(c, score=score) for c, score in zip(classes, scores, strict=True)],
            boxes=field("boxes"),
            # predicted ones are a tensor, others have a class of their own
            masks=list(np.asarray(masks)) if masks is not None and prefix == "pred_" else masks,
            keypoints=field("keypoints"),
            extreme_points=None if points is None else points.numpy(),
        )

    def _overlay(
        self, *, classes: list, labels: list[str], extreme_points: np.ndarray | None, **shapes: Any
    ) -> VisImage:
        colors = [self._color(index, label) for index, label in enumerate(classes)]
        self.overlay_instances(labels=labels, assigned_colors=colors, alpha=0.4, **shapes)
        if extreme_points is not None:
            self.overlay_extreme_points(extreme_points, colors)
        return self.output

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


def read_rgb(path: str) -> np.ndarray:
    """An image file as (H, W, 3), RGB, turned as its EXIF data say."""
    return detection_utils.read_image(path, format="RGB")


def side_by_side(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Two pictures (H, W, 3) of the same height with a white bar between them."""
    bar = np.full((left.shape[0], max(4, left.shape[1] // 100), 3), 255, dtype=left.dtype)
    return np.concatenate([left, bar, right], axis=1)

"""What LSNet's pictures are made of: extreme points, contours, masks, keypoints."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import matplotlib.colors
import numpy as np
from detectron2.utils.visualizer import ColorMode, VisImage, Visualizer
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.patheffects import withStroke

from .data.keypoints import known_keypoint_names
from .data.polygons import signed_area

# Small pictures are enlarged to this many pixels along their longer side.
MIN_LONG_SIDE = 640

CONTOUR_STYLES = ("filled", "outlined")

# People's trunk: the middles of these keypoints in a row.
_TRUNK = (("nose",), ("left_shoulder", "right_shoulder"), ("left_hip", "right_hip"))
_TRUNK_COLOR = (1.0, 0.5, 0.0)

# Predicted keypoints count above this score, as in Detectron2.
KEYPOINT_THRESHOLD = 0.05

# What an object covers: parts, each a polygon (n, 2); or a mask (H, W) of 0 and 1.
Region = list[np.ndarray] | np.ndarray
Names = tuple[str, ...]


def skeleton_bones(metadata: Any) -> list[tuple[Names, Names, tuple[float, float, float]]]:
    """The bones of a data set's skeleton: two ends, each the middle of the keypoints of these
    names, and a colour (RGB in [0, 1]).

    COCO's rules have no trunk. Detectron2 adds one to people, through the middles of the shoulders
    and the hips; it has the rules' colour of these here.
    """
    bones = [
        ((first,), (second,), tuple(value / 255 for value in color))
        for first, second, color in metadata.get("keypoint_connection_rules") or []
    ]
    if "nose" in (metadata.get("keypoint_names") or []):
        bones += [(*ends, _TRUNK_COLOR) for ends in pairwise(_TRUNK)]
    return bones


class LandmarkPainter(Visualizer):
    """Detectron2's visualizer with LSNet's landmarks, and lines that fit the picture.

    Its methods take arrays in pixels of the input image; what is drawn of instances and
    annotations is up to :class:`lsnet_d2.visualizer.LSNetVisualizer`.
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
        keypoint_threshold: float = KEYPOINT_THRESHOLD,
    ) -> None:
        """
        Args:
            img_rgb: (H, W, 3), RGB in [0, 255].
            metadata: of the data set, for the names and colours of classes, and the skeleton.
            scale: size of the output relative to the input. None: small images are enlarged to
                MIN_LONG_SIDE, others are kept.
            contours: one of CONTOUR_STYLES, for contours and masks.
            keypoint_threshold: predicted keypoints are drawn above this score.

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
        names = known_keypoint_names(self.metadata, len(keypoints))
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

    @property
    def _points_per_pixel(self) -> float:
        """Typographic points, matplotlib's unit of widths, per pixel of the input."""
        return self.output.scale * 72 / self.output.dpi

    def _bones(self, joints: dict[str, np.ndarray]) -> list[tuple]:
        """Ends (2,) and colours of the bones between joints that are drawn."""
        return [
            (*(np.mean([joints[name] for name in names], axis=0) for names in ends), color)
            for *ends, color in skeleton_bones(self.metadata)
            if all(name in joints for names in ends for name in names)
        ]

    def _draw_polygons(self, polygons: list[np.ndarray], color: Any) -> None:
        # the same sense of rotation makes parts that overlap one area
        parts = [p if signed_area(p) > 0 else p[::-1] for p in polygons]
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


def _extent(region: Region) -> float:
    """Area of the box around a region, pixels."""
    if isinstance(region, np.ndarray):
        return float(np.ptp(np.flatnonzero(region.any(axis=0))) + 1) * float(
            np.ptp(np.flatnonzero(region.any(axis=1))) + 1
        )
    return float(np.ptp(np.concatenate(region), axis=0).prod())

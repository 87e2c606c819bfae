"""Draws one scene of the ``shapes`` data set: background, objects, who hides whom.

Everything is in continuous image coordinates: xy order, the top left pixel covers [0, 1] x [0, 1].
Masks live on a grid ``SUPERSAMPLING`` times finer than the image, and the image is painted from the
same masks, so that annotation and picture agree to a fraction of a pixel.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from .shapes_objects import CLASS_NAMES, MIN_EXTENTS, Outline, random_cluster, random_outline
from .shapes_paint import (
    contrasting_colour,
    draw_background,
    draw_texture,
    figure_palette,
    finish,
)

SUPERSAMPLING = 4

EMPTY_SCENES = 0.02  # share of scenes without objects
CROWD_SCENES = 0.02  # share of scenes with a crowd
MIN_VISIBLE = (
    0.55  # an object is not placed if it leaves less than this of another one, or of itself
)
MIN_VISIBLE_AREA = 44.0  # pixels of the image, same rule
_TRIES = 12  # places tried for an object before it is left out


@dataclass
class SceneObject:
    """One object of a scene.

    Attributes:
        class_name: one of ``CLASS_NAMES``.
        is_crowd: a cluster of many objects that is annotated as one.
        area: of the whole outline, hidden parts and parts beyond the border too; image pixels.
        visible_area: of what is seen of it, image pixels.
        keypoints: (13, 3) x, y, visibility (2 seen, 1 hidden by something, 0 outside the image,
            then x = y = 0), or None.
    """

    class_name: str
    is_crowd: bool
    area: float
    visible_area: float
    keypoints: np.ndarray | None


@dataclass
class Scene:
    """A picture and its objects.

    Attributes:
        image: (size, size, 3) uint8, RGB.
        objects: from back to front.
        owner: (S * size, S * size) uint8 with S = ``SUPERSAMPLING``: 1 + index of the object that
            is seen there, 0 where there is background.
    """

    image: np.ndarray
    objects: list[SceneObject]
    owner: np.ndarray

    def visible_mask(self, index: int) -> np.ndarray:
        """Where object ``index`` is seen: like ``owner``, uint8, 0 or 1."""
        return (self.owner == index + 1).astype(np.uint8)


def draw_scene(rng: np.random.Generator, size: int) -> Scene:
    """Draw a scene of ``size`` x ``size`` pixels. All that varies comes from ``rng``.

    Raises:
        ValueError: ``size`` is below 64, too little room for objects of 12 pixels and more.
    """
    if size < 64:
        raise ValueError(f"size must be at least 64 pixels, got {size}")
    canvas = draw_background(rng, size)
    scene = Scene(canvas, [], np.zeros((size * SUPERSAMPLING,) * 2, np.uint8))
    if rng.random() >= EMPTY_SCENES:
        if rng.random() < CROWD_SCENES:
            _try_to_place(rng, scene, str(rng.choice(CLASS_NAMES[:-1])), is_crowd=True)
        for _ in range(rng.integers(2, 9)):
            _try_to_place(rng, scene, str(rng.choice(CLASS_NAMES)), is_crowd=False)
    scene.image = finish(rng, scene.image)
    for index, thing in enumerate(scene.objects):
        _hide_keypoints(scene, index, thing)
    return scene


def _try_to_place(rng: np.random.Generator, scene: Scene, class_name: str, is_crowd: bool) -> None:
    """Paint one object, unless no place is found where it and all others stay visible enough."""
    size = scene.image.shape[0]
    if is_crowd:
        outline = random_cluster(rng, class_name, size * rng.uniform(0.24, 0.36))
    else:
        extent = np.exp(rng.uniform(np.log(MIN_EXTENTS[class_name]), np.log(size / 2)))
        outline = random_outline(rng, class_name, extent)
    reach = (outline.box()[2:] - outline.box()[:2]) / 2
    # One object in five may be cut by the border, by up to a third of its box on each axis.
    margin = reach * (0.34 if rng.random() < 0.2 else 1.0)
    for _ in range(_TRIES):
        centre = rng.uniform(margin, size - margin)
        drawing = _Drawing(outline.transformed(np.eye(2), centre), size)
        if drawing.fits(scene):
            drawing.paint(rng, scene, class_name, is_crowd)
            return


class _Drawing:
    """An outline drawn on its own small fine grid, which may reach over the image's border."""

    def __init__(self, outline: Outline, size: int) -> None:
        x0, y0, x1, y1 = outline.box()
        left, top = int(np.floor(x0)) - 1, int(np.floor(y0)) - 1
        width, height = int(np.ceil(x1)) + 1 - left, int(np.ceil(y1)) + 1 - top
        self.outline = outline
        self.tones = list(dict.fromkeys(part.tone for part in outline.parts))
        self.origin = np.array([left, top])
        self.part_map = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), np.uint8)
        for label, part in enumerate(outline.parts, start=1):
            cv2.fillPoly(self.part_map, self._fine(part.polygons), label, shift=4)
        self.mask = self.part_map > 0

        # The window that lies in the image: of the image, of the drawing, and both on fine grids.
        self.image_window = (
            slice(max(top, 0), min(top + height, size)),
            slice(max(left, 0), min(left + width, size)),
        )
        rows, columns = self.image_window
        self.window = (
            slice(rows.start - top, rows.stop - top),
            slice(columns.start - left, columns.stop - left),
        )
        self.fine_image_window, self.fine_window = (
            tuple(slice(s.start * SUPERSAMPLING, s.stop * SUPERSAMPLING) for s in window)
            for window in (self.image_window, self.window)
        )

    def _fine(self, polygons: tuple[np.ndarray, ...]) -> list[np.ndarray]:
        """Vertices as OpenCV wants them: index of a fine pixel (centre = .0), times 2 ** 4."""
        return [
            np.round(((p - self.origin) * SUPERSAMPLING - 0.5) * 16).astype(np.int32)
            for p in polygons
        ]

    def fits(self, scene: Scene) -> bool:
        """Whether this and all objects of the scene stay visible when this one comes on top."""
        own = _pixels(self.mask[self.fine_window])
        return own >= max(MIN_VISIBLE * _pixels(self.mask), MIN_VISIBLE_AREA) and all(
            thing.visible_area - covered >= max(MIN_VISIBLE * thing.area, MIN_VISIBLE_AREA)
            for thing, covered in zip(scene.objects, self._covered(scene), strict=True)
        )

    def _covered(self, scene: Scene) -> np.ndarray:
        """Area that this would take from each object of the scene, image pixels."""
        owners = scene.owner[self.fine_image_window][self.mask[self.fine_window]]
        counts = np.bincount(owners, minlength=len(scene.objects) + 1)
        return counts[1:] / SUPERSAMPLING**2

    def paint(
        self, rng: np.random.Generator, scene: Scene, class_name: str, is_crowd: bool
    ) -> None:
        """Put the object on top of the scene."""
        colours = self._paint_colours(rng, scene.image[self.image_window], class_name)
        shape = tuple(n // SUPERSAMPLING for n in self.mask.shape)[::-1]
        colours = cv2.resize(colours, shape, interpolation=cv2.INTER_AREA).astype(np.float32)
        alpha = cv2.resize(self.mask.astype(np.float32), shape, interpolation=cv2.INTER_AREA)
        colours *= draw_texture(rng, *alpha.shape)[..., None]
        region = scene.image[self.image_window]
        region *= 1 - alpha[self.window][..., None]
        region += colours[self.window]

        for thing, covered in zip(scene.objects, self._covered(scene), strict=True):
            thing.visible_area -= covered
        inside = self.mask[self.fine_window]
        thing = SceneObject(
            class_name, is_crowd, _pixels(self.mask), _pixels(inside), self._keypoints()
        )
        scene.objects.append(thing)
        scene.owner[self.fine_image_window][inside] = len(scene.objects)

    def _paint_colours(
        self, rng: np.random.Generator, behind: np.ndarray, class_name: str
    ) -> np.ndarray:
        """Colours on the fine grid, (h, w, 3) uint8, black outside the mask."""
        rows, columns = behind.shape[0] // 2, behind.shape[1] // 2
        halves = (behind[:rows], behind[rows:], behind[:, :columns], behind[:, columns:])
        around = [half.mean(axis=(0, 1)) for half in halves]
        if class_name == "figure":
            palette = figure_palette(rng, around)
        else:
            palette = {tone: contrasting_colour(rng, around) for tone in self.tones}
        table = np.zeros((len(self.outline.parts) + 1, 3), np.uint8)
        for label, part in enumerate(self.outline.parts, start=1):
            table[label] = palette[part.tone]
        colours = table[self.part_map]
        if class_name != "figure" and len(self.outline.parts) == 1 and rng.random() < 0.4:
            # Twice as wide as what stays of it: the outer half is cut off.
            width = rng.uniform(1.2, min(3.0, max(self.mask.shape) / SUPERSAMPLING / 8))
            width = max(1, round(SUPERSAMPLING * width))
            edge = table[1] * rng.choice([0.45, 0.65]) + rng.choice([0.0, 90.0])
            polygons = self._fine(self.outline.parts[0].polygons)
            cv2.polylines(colours, polygons, True, edge.tolist(), width, shift=4)
            colours[~self.mask] = 0
        return colours

    def _keypoints(self) -> np.ndarray | None:
        """(13, 3); visibility here is 2, or 1 where the figure itself is in the way."""
        if self.outline.keypoints is None:
            return None
        names = [None, *(part.name for part in self.outline.parts)]
        columns, rows = ((self.outline.keypoints - self.origin) * SUPERSAMPLING).astype(int).T
        on_top = [names[label] for label in self.part_map[rows, columns]]
        seen = [
            2.0 if name in meeting else 1.0
            for name, meeting in zip(on_top, self.outline.keypoint_parts, strict=True)
        ]
        return np.column_stack([self.outline.keypoints, seen])


def _pixels(fine_mask: np.ndarray) -> float:
    """Area of a mask on the fine grid, in pixels of the image."""
    return int(fine_mask.sum()) / SUPERSAMPLING**2


def _hide_keypoints(scene: Scene, index: int, thing: SceneObject) -> None:
    """Lower the visibility of keypoints that other objects cover (1) or the border cuts off (0)."""
    if thing.keypoints is None:
        return
    size = scene.image.shape[0]
    for keypoint in thing.keypoints:
        if (keypoint[:2] < 0).any() or (keypoint[:2] >= size).any():
            keypoint[:] = 0
            continue
        column, row = (keypoint[:2] * SUPERSAMPLING).astype(int)
        if scene.owner[row, column] != index + 1:
            keypoint[2] = 1

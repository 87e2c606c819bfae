"""From the original image to the augmented one: what moves where, and what is still to be seen."""

import numpy as np
from fvcore.transforms.transform import CropTransform, Transform, TransformList

from .polygons import clip_polygons

# Pixels by which a box may be off through rounding alone.
_TOLERANCE = 1e-2
# Outward directions of the top, left, bottom and right sides.
_OUTWARD = np.array([[0.0, -1.0], [-1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])


class Viewport:
    """Takes coordinates through a list of transforms and cuts off what leaves the picture.

    What a crop cuts off stays cut off, even if a later transform pads the image there. No method
    changes its argument.

    Attributes:
        transforms: what was done to the image.
        axis_aligned: whether upright boxes stay upright boxes (no rotation but by right angles).
        mirrored: whether left and right have changed places, as in a flip of either kind.
    """

    def __init__(
        self,
        transforms: Transform,
        *,
        original_size: tuple[int, int],
        image_size: tuple[int, int],
    ) -> None:
        """
        Args:
            transforms: what was done to the image.
            original_size: (height, width) before.
            image_size: (height, width) after.
        """
        self.transforms = TransformList([transforms])  # without nesting
        self.original_size = original_size
        self.image_size = image_size
        height, width = original_size
        origin, right, down = self.points(np.array([[0, 0], [width, 0], [0, height]]))
        self._directions = np.stack([(right - origin) / width, (down - origin) / height])
        off_axis = [np.abs(right - origin).min(), np.abs(down - origin).min()]
        self.axis_aligned = max(off_axis) <= _TOLERANCE
        self.mirrored = bool(np.linalg.det(self._directions) < 0)

    def points(self, points: np.ndarray) -> np.ndarray:
        """Points (n, 2) in the augmented image's pixels, inside or not."""
        return self.transforms.apply_coords(np.array(points, dtype=np.float64))

    def polygons(self, polygons: list[np.ndarray]) -> list[np.ndarray]:
        """The visible parts of polygons; those out of sight vanish."""
        polygons = [np.array(polygon, dtype=np.float64) for polygon in polygons]
        for transform in self.transforms.transforms:
            polygons = [transform.apply_coords(polygon) for polygon in polygons]
            if isinstance(transform, CropTransform):
                polygons = clip_polygons(polygons, transform.w, transform.h)
        height, width = self.image_size
        return clip_polygons(polygons, width, height)

    def boxes(self, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The visible parts of upright boxes (N, 4) XYXY; around them, where they are rotated.

        Returns:
            (N, 4) float64, of zero width or height where nothing is visible; and a mask (N,) of
            boxes of which some part inside the original image was cut off.
        """
        height, width = self.original_size
        boxes = _limit(np.array(boxes, dtype=np.float64).reshape(-1, 4), width, height)
        cut = np.zeros(len(boxes), dtype=bool)
        for transform in self.transforms.transforms:
            boxes = transform.apply_box(boxes)
            if isinstance(transform, CropTransform):
                whole, boxes = boxes, _limit(boxes, transform.w, transform.h)
                cut |= (np.abs(whole - boxes) > _TOLERANCE).any(axis=1)
        height, width = self.image_size
        whole, boxes = boxes, _limit(boxes, width, height)
        return boxes, cut | (np.abs(whole - boxes) > _TOLERANCE).any(axis=1)

    def sides(self, points: np.ndarray) -> np.ndarray:
        """Points that mark the sides of an object, moved and named anew.

        A flip makes the left point the right one, a rotation by 90 degrees the top one the left
        or the right one. After other rotations it goes by which point lies farthest out.

        Args:
            points: (4, 2) top, left, bottom, right in the original image.

        Returns:
            (4, 2) top, left, bottom, right in the augmented image's pixels, inside or not.
        """
        moved = self.points(points)
        if self.axis_aligned:
            # how far each old side's direction now leads towards each new side
            return moved[(_OUTWARD @ (_OUTWARD @ self._directions).T).argmax(axis=1)]
        return moved[(_OUTWARD @ moved.T).argmax(axis=1)]


def _limit(boxes: np.ndarray, width: float, height: float) -> np.ndarray:
    return np.clip(boxes, 0, [width, height, width, height])

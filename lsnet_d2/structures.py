"""Masks that are outlines until someone asks for pixels."""

import operator
from collections.abc import Iterator, Sequence
from typing import SupportsIndex

import numpy as np
import torch
from detectron2.structures import Boxes
from pycocotools import mask as mask_util
from torch import Tensor

from .data.polygons import polygons_to_rle


class ContourMasks:
    """The masks that N contours enclose, as a field of ``Instances``.

    It stands where Detectron2's own code expects a tensor (N, H, W): iterating over it, indexing
    it and converting it to an array give bitmaps, made at that moment. An outline that crosses
    itself is filled by COCO's rule, the same that evaluation has.

    Attributes:
        contours: (N, P, 2) float as x, y in pixels of the image.
        image_size: (height, width) of the image.
    """

    def __init__(self, contours: Tensor, image_size: tuple[int, int]) -> None:
        """
        Raises:
            ValueError: ``contours`` is not (N, P, 2) with P of at least 3.
        """
        if contours.dim() != 3 or contours.shape[1] < 3 or contours.shape[2] != 2:
            raise ValueError(f"contours must be (N, P, 2), P >= 3, not {tuple(contours.shape)}")
        self.contours = contours
        self.image_size = image_size

    def rles(self) -> list[dict]:
        """The masks as COCO's compressed RLE, without making bitmaps."""
        return polygons_to_rle(self.contours.detach().cpu().double().numpy(), *self.image_size)

    @property
    def tensor(self) -> Tensor:
        """(N, H, W) bool, on the device of the contours."""
        if not len(self):
            return torch.zeros((0, *self.image_size), dtype=torch.bool, device=self.device)
        bitmaps = mask_util.decode(self.rles())
        return torch.from_numpy(bitmaps.transpose(2, 0, 1).astype(bool)).to(self.device)

    @property
    def device(self) -> torch.device:
        return self.contours.device

    def __len__(self) -> int:
        return len(self.contours)

    def __getitem__(self, index: SupportsIndex | slice | Tensor) -> "Tensor | ContourMasks":
        """A bitmap (H, W) for a number, also one of numpy or a tensor of none, else the chosen
        masks."""
        if isinstance(index, SupportsIndex) and not getattr(index, "ndim", 0):
            return self[[operator.index(index)]].tensor[0]
        return ContourMasks(self.contours[index], self.image_size)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        bitmaps = self.tensor.cpu().numpy()
        return bitmaps if dtype is None else bitmaps.astype(dtype)

    def __repr__(self) -> str:
        return f"ContourMasks(num_instances={len(self)}, image_size={self.image_size})"

    def to(self, *args, **kwargs) -> "ContourMasks":
        return ContourMasks(self.contours.to(*args, **kwargs), self.image_size)

    def get_bounding_boxes(self) -> Boxes:
        """The boxes around the contours."""
        return Boxes(torch.cat([self.contours.amin(dim=1), self.contours.amax(dim=1)], dim=1))

    @staticmethod
    def cat(masks: "Sequence[ContourMasks]") -> "ContourMasks":
        """Masks of the same image one after the other."""
        return ContourMasks(torch.cat([m.contours for m in masks]), masks[0].image_size)

"""Maps that teach the features which the third stage looks at.

A landmark is seen at a few points of an image, and they alone teach the features under them. A map
has something to learn in every cell. (BlendMask, arXiv 2001.00309, and others learn a semantic map
beside their objects.)

Letters: B images, C channels, (H, W) the size of a map, G objects, V landmarks of a branch. Cell
(i, j) of a map with stride s lies at x = j * s, y = i * s, as anchor points do.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from detectron2.utils import comm
from torch import Tensor, nn

from .distributed import mean_over_workers
from .landmarks import LandmarkTargets
from .points import make_anchor_points, points_in_boxes


class LandmarkMaps(nn.Module, ABC):
    """What one branch can tell about every cell.

    Attributes:
        key: ``MODEL.LSNET.{key}`` says whether there are maps, ``{key}_LOSS_WEIGHTS`` how much each
            of their losses counts.
        loss_names: of the losses.
    """

    key: str
    loss_names: tuple[str, ...]

    def __init__(self, stride: int, loss_weights: Sequence[float]) -> None:
        """
        Args:
            stride: of the features.
            loss_weights: of each loss.

        Raises:
            ValueError: there is not one weight for each loss; the message names the config's key.
        """
        super().__init__()
        if len(loss_weights) != len(self.loss_names):
            raise ValueError(
                f"MODEL.LSNET.{self.key}_LOSS_WEIGHTS is {list(loss_weights)}; it must have "
                f"{len(self.loss_names)} values"
            )
        self.stride = stride
        self.loss_weights = loss_weights

    def losses(
        self,
        feature: Tensor,
        targets: list[LandmarkTargets],
        classes: list[Tensor],
        known: Tensor,
    ) -> dict[str, Tensor]:
        """The losses by name, each with its weight; arguments as of :meth:`errors`."""
        errors = self.errors(feature, targets, classes, known)
        entries = zip(self.loss_names, self.loss_weights, errors, strict=True)
        return {name: weight * error for name, weight, error in entries}

    @abstractmethod
    def errors(
        self,
        feature: Tensor,
        targets: list[LandmarkTargets],
        classes: list[Tensor],
        known: Tensor,
    ) -> tuple[Tensor, ...]:
        """How far the maps are off: means over all processes, one for each loss.

        Args:
            feature: (B, C, H, W), what the maps are made from.
            targets: per image, of objects whose landmarks are known.
            classes: per image (G,), theirs.
            known: (B, H, W) bool, cells that count.
        """


def known_cells(
    size: tuple[int, int],
    stride: int,
    image_sizes: Sequence[tuple[int, int]],
    ignored: list[Tensor],
) -> Tensor:
    """(B, H, W) bool: cells on the images, and in no region of which nothing is known.

    Args:
        size: (H, W).
        image_sizes: (height, width) of each image, without padding.
        ignored: per image (R, 4) XYXY in pixels.
    """
    cells = make_anchor_points([size], [stride], ignored[0].device).xy
    return torch.stack(
        [
            ~points_in_boxes(cells, regions) & (cells < cells.new_tensor([width, height])).all(1)
            for regions, (height, width) in zip(ignored, image_sizes, strict=True)
        ]
    ).unflatten(1, size)


def mean_of(values: Tensor, counted: Tensor) -> Tensor:
    """The mean of the values that count, of all processes; 0 if there is none."""
    return (values * counted).sum() / at_least_one(counted.sum())


def at_least_one(count: Tensor) -> Tensor:
    """A number to divide by: its mean over processes, and 1 where it is 0 in all of them."""
    return mean_over_workers(count.float()).clamp(min=1 / comm.get_world_size())

"""Maps of what covers a cell, and of where the nearest outline is, which teach features.

The third stage looks at an image in a few points, and they alone teach the features under them.
Where there are outlines, every cell has something to tell: the classes of the objects that cover
it, and where the nearest outline is. (BlendMask, arXiv 2001.00309, and others learn a semantic map
beside their objects.) At test time these maps are not computed, only the features that they are
made from.

Letters: B images, C channels, (H, W) the size of a map, G objects, K classes, P vertices. Cell
(i, j) of a map with stride s lies at x = j * s, y = i * s, as anchor points do.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.utils import comm
from torch import Tensor, nn

from .areas import cells_inside, to_segment
from .assigners import lowest_cost
from .blocks import same_conv, set_prior
from .distributed import mean_over_workers
from .landmarks import LandmarkTargets, as_indices
from .points import make_anchor_points, points_in_boxes, square_lattice

# How far from an outline a cell tells where it is, in cells, and the cells around an outline's
# points that may be as near.
_REACH = 1.5
_WINDOW = 2
_COVERED_BEFORE_TRAINING = 0.05


class OutlineMaps(nn.Module):
    """Two dense maps that teach the features under them: semantic segmentation, and for cells on
    outlines the displacement to the nearest point of one. Inference does not make them.
    """

    def __init__(
        self, *, channels: int, num_classes: int, stride: int, loss_weights: Sequence[float]
    ) -> None:
        """
        Args:
            channels: C.
            num_classes: K.
            stride: of the features.
            loss_weights: of what covers a cell, and of where the nearest outline is.

        Raises:
            ValueError: there are not two weights; the message names the config's key.
        """
        super().__init__()
        if len(loss_weights) != 2:
            raise ValueError(
                f"MODEL.LSNET.OUTLINE_MAPS_LOSS_WEIGHTS is {list(loss_weights)}; it must have 2 "
                "values"
            )
        self.stride = stride
        self.loss_weights = loss_weights
        self.covering = same_conv(channels, num_classes, 1)
        self.displacement = same_conv(channels, 2, 1)
        set_prior(self.covering, _COVERED_BEFORE_TRAINING)

    def losses(
        self,
        feature: Tensor,
        targets: list[LandmarkTargets],
        classes: list[Tensor],
        known: Tensor,
    ) -> dict[str, Tensor]:
        """The losses by name, each with its weight: means over the cells of all processes.

        Args:
            feature: (B, C, H, W), what the maps are made from.
            targets: per image, of objects whose contours are known.
            classes: per image (G,), theirs.
            known: (B, H, W) bool, cells that count.
        """
        covering = self.covering(feature).float()
        displacement = self.displacement(feature).float().permute(0, 2, 3, 1)
        num_classes, *size = covering.shape[1:]
        contours = [t.landmarks for t in targets]
        covered = torch.stack(
            [
                classes_of_cells(outlines, labels, num_classes, size, self.stride)
                for outlines, labels in zip(contours, classes, strict=True)
            ]
        )
        nearest, near = zip(
            *(nearest_outline(outlines, size, self.stride) for outlines in contours), strict=True
        )
        loss = F.binary_cross_entropy_with_logits(covering, covered, reduction="none").mean(1)
        away = (displacement - torch.stack(nearest) / self.stride).abs().sum(3)
        of_covering, of_outline = self.loss_weights
        return {
            "loss_covering": of_covering * mean_of(loss, known),
            "loss_outline": of_outline * mean_of(away, torch.stack(near) & known),
        }


def classes_of_cells(
    contours: Tensor, classes: Tensor, num_classes: int, size: tuple[int, int], stride: int
) -> Tensor:
    """(K, H, W), 1 where an object of the class covers the cell, else 0.

    Args:
        contours: (G, P, 2) in pixels.
        classes: (G,).
        size: (H, W).
    """
    covered = contours.new_zeros(num_classes, *size)
    inside = cells_inside(contours / stride, size).to(covered)
    index = classes[:, None, None].expand_as(inside)
    return covered.scatter_reduce(0, index, inside, "amax")


def nearest_outline(contours: Tensor, size: tuple[int, int], stride: int) -> tuple[Tensor, Tensor]:
    """Where the nearest outline is from each cell that has one nearby.

    Args:
        contours: (G, P, 2) in pixels.
        size: (H, W).

    Returns:
        (H, W, 2), the displacement as x, y in pixels, 0 where none is near; (H, W) bool, cells that
        are near.
    """
    height, width = size
    start = (contours / stride).flatten(0, 1)
    along = (contours.roll(-1, 1) / stride).flatten(0, 1) - start
    # Points on the outlines no further apart than a cell, and the cells around them.
    pieces = along.norm(dim=1).ceil().clamp(min=1).long()
    segment = torch.repeat_interleave(pieces)
    first = pieces.cumsum(0) - pieces
    share = (torch.arange(len(segment), device=start.device) - first[segment]) / pieces[segment]
    points = start[segment] + share[:, None] * along[segment]
    window = square_lattice(torch.arange(-_WINDOW, _WINDOW + 1, device=start.device))
    cells = points.round().long()[:, None] + window  # (M, 25, 2)
    segment = segment[:, None].expand(cells.shape[:2])
    # As indices: with a mask the host would wait for the GPU at each tensor.
    on_map = ((cells >= 0) & (cells < cells.new_tensor([width, height]))).all(2)
    on_map = torch.nonzero(on_map, as_tuple=True)
    cells, segment = cells[on_map], segment[on_map]
    distance = to_segment(cells, start[segment], along[segment]).norm(dim=1)
    close = as_indices(distance < _REACH)
    cells, segment = cells[close], segment[close]
    owner = lowest_cost(height * width, cells[:, 1] * width + cells[:, 0], segment, distance[close])
    near = torch.nonzero(owner >= 0).squeeze(1)
    segment = owner[near]
    cells = torch.stack([near % width, near // width], dim=1)
    displacement = start.new_zeros(height * width, 2)
    displacement[near] = stride * to_segment(cells, start[segment], along[segment])
    return displacement.view(height, width, 2), (owner >= 0).view(height, width)


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

"""The search for a landmark in a window around the place where it is taken to be.

Every landmark has a map that says of each place how much it looks like this landmark. The map is
read on a lattice around the place, which is as large as the object is, so that a softmax over it
says where in the window the landmark is. Where in the window it usually is, is learned too. (Mask
R-CNN, arXiv 1703.06870, finds keypoints by a softmax over a region. There each region has maps of
its own; here all objects share them, and the place where a landmark is sought tells whose it is.)

Letters: B images, N points, V landmarks, K rows and columns of a lattice, (H, W) the size of a map.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers.bilinear import bilinear_corners, neighbours
from .points import square_lattice

_COUNT = 11


@dataclass
class SearchResult:
    """What the search says.

    Attributes:
        logits: (N, V, K * K), of the landmark being at each place of the lattice.
        start: (N, V, 2), the middle of the window.
        size: (N, 1, 1), that of the object, in pixels.
        lattice: (K * K, 2) as x, y, in sizes from the middle; row by row.
    """

    logits: Tensor
    start: Tensor
    size: Tensor
    lattice: Tensor

    def __getitem__(self, index: Tensor) -> "SearchResult":
        return SearchResult(self.logits[index], self.start[index], self.size[index], self.lattice)

    def expectation(self) -> tuple[Tensor, Tensor]:
        """Where the landmark is expected (N, V, 2), in sizes from the middle, and the largest
        probability of a place (N, V, 1)."""
        probs = self.logits.softmax(dim=2)
        # No matrix product, which autocast would compute in low precision.
        offset = [(probs * ticks).sum(dim=2) for ticks in self.lattice.unbind(1)]
        return torch.stack(offset, dim=2), probs.amax(dim=2, keepdim=True)

    def loss(self, landmarks: Tensor, visible: Tensor) -> Tensor:
        """(N,): cross-entropy, the mean over the visible landmarks that are in their windows.

        A place between those of the lattice is shared by the four around it.

        Args:
            landmarks: (N, V, 2), where they are.
            visible: (N, V) bool, whose places are known.
        """
        count = round(len(self.lattice) ** 0.5)
        low, high = self.lattice[0], self.lattice[-1]
        place = (landmarks - self.start) / self.size
        cell = (place - low) / (high - low) * (count - 1)
        inside = (visible & (cell >= 0).all(-1) & (cell <= count - 1).all(-1)).to(place)
        x, y = cell.clamp(0, count - 1).unbind(-1)
        index, weight = bilinear_corners(y, x, count, count)
        of_corners = self.logits.log_softmax(dim=2).gather(2, index.long())
        loss = -(weight * of_corners).sum(2) * inside
        return loss.sum(1) / inside.sum(1).clamp(min=1)


class LandmarkSearch(nn.Module):
    """Looks for each landmark on its own heatmap, in a window around the place where it was.

    What it finds is a soft-argmax over a lattice of places (:class:`SearchResult`).
    """

    def __init__(self, num_landmarks: int, reach: float) -> None:
        """
        Args:
            num_landmarks: V.
            reach: from the middle of the window to its sides, in sizes of the object.
        """
        super().__init__()
        ticks = torch.linspace(-reach, reach, _COUNT)
        lattice = square_lattice(ticks)
        self.register_buffer("ticks", ticks, persistent=False)
        self.register_buffer("lattice", lattice, persistent=False)
        # At first it is most likely in the middle.
        prior = -2 * (lattice / reach).square().sum(1)
        self.prior = nn.Parameter(prior.repeat(num_landmarks, 1))

    def forward(
        self, heatmaps: Tensor, stride: int, image: Tensor, landmarks: Tensor, size: Tensor
    ) -> SearchResult:
        """
        Args:
            heatmaps: (B, V, H, W), logits.
            stride: of the heatmaps.
            image: (N,), in which image the points are.
            landmarks: (N, V, 2) in pixels, where they are taken to be.
            size: (N, 1, 1) in pixels.
        """
        x, y = (landmarks[:, :, None] + size[..., None] * self.ticks[:, None]).unbind(-1)
        logits = sample_own_heatmaps(heatmaps.float(), stride, image, x, y).flatten(2) + self.prior
        return SearchResult(logits, landmarks, size, self.lattice)


def sample_own_heatmaps(
    heatmaps: Tensor, stride: int, image: Tensor, x: Tensor, y: Tensor
) -> Tensor:
    """Each landmark's own map on a lattice of places of the images, interpolated.

    Outside it is as on the border: 0, say, could be far more than what a map has where nothing is.

    Args:
        heatmaps: (B, V, H, W), cell (i, j) lying at x = j * stride, y = i * stride.
        image: (N,), in which image the lattices are.
        x: (N, V, K), of the lattice's columns, in pixels.
        y: (N, V, K), of its rows.

    Returns:
        (N, V, K, K), row by row.
    """
    number, height, width = heatmaps.shape[1:]
    column, of_column = _cells(x, stride, width)
    row, of_row = _cells(y, stride, height)
    own = image[:, None] * number + torch.arange(number, device=heatmaps.device)
    first = (own[:, :, None, None] * height + row) * width
    # (N, V, K, 2, K, 2): by row and column of the lattice, each between two of the map.
    index = first[..., None, None] + column[:, :, None, None]
    values = heatmaps.flatten().gather(0, index.flatten()).view(index.shape)
    values = (values * of_column[:, :, None, None].to(values)).sum(-1)
    return (values * of_row[..., None].to(values)).sum(3)


def _cells(position: Tensor, stride: int, size: int) -> tuple[Tensor, Tensor]:
    """The two of ``size`` cells around positions (...) in pixels, (..., 2), and their weights."""
    # Places in half precision would be off by pixels.
    position = position.to(torch.promote_types(position.dtype, torch.float32))
    return neighbours((position / stride).clamp(0, size - 1), size)

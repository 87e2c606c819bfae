"""Telling which object of a video is which, so that each keeps its colour.

Detectron2's ``VideoVisualizer`` is not used: it draws by itself, with the stock visualizer, and
matches a box with where the object was instead of where it should be by now.
"""

from dataclasses import dataclass

import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor


@dataclass
class Track:
    """An object that was seen.

    Attributes:
        identity: its number.
        label: its class.
        box: (4,) XYXY in the last frame; where it should be, while it is missed.
        motion: (4,) change of the box per frame, smoothed.
        missed: frames since it was seen.
    """

    identity: int
    label: int
    box: Tensor
    motion: Tensor
    missed: int = 0


class Tracker:
    """Numbers the objects of consecutive frames.

    Boxes go to the objects of their class that they overlap most, best pairs first. An object is
    expected to move on as it did, which keeps apart those that pass each other, and is remembered
    for some frames in which it is missed. The number of one that is gone is given to another.
    """

    def __init__(self, *, min_iou: float = 0.3, patience: int = 8) -> None:
        """
        Args:
            min_iou: between a box and where its object is expected.
            patience: frames in a row for which an object may be missed.
        """
        self.min_iou = min_iou
        self.patience = patience
        self.tracks: list[Track] = []

    def update(self, predictions: Instances) -> list[int]:
        """Take the next frame.

        Args:
            predictions: N, with ``pred_boxes`` and ``pred_classes``.

        Returns:
            N different numbers from 0: for an object that was seen before the same as then, for
            others the lowest that are free.
        """
        boxes = predictions.pred_boxes.tensor.detach().cpu().float()
        labels = predictions.pred_classes.tolist()
        matched = self._match(boxes, labels)
        for index, track in matched.items():
            # half of what is new: boxes of a detector jitter
            track.motion = (track.motion + boxes[index] - track.box) / 2
            track.box, track.missed = boxes[index], 0
        seen = {track.identity for track in matched.values()}
        for track in self.tracks:
            if track.identity not in seen:
                track.box = track.box + track.motion
                track.missed += 1
        self.tracks = [track for track in self.tracks if track.missed <= self.patience]
        taken = {track.identity for track in self.tracks}
        for index, label in enumerate(labels):
            if index not in matched:
                identity = next(i for i in range(len(taken) + 1) if i not in taken)
                taken.add(identity)
                matched[index] = Track(identity, label, boxes[index], torch.zeros(4))
                self.tracks.append(matched[index])
        return [matched[index].identity for index in range(len(labels))]

    def _match(self, boxes: Tensor, labels: list[int]) -> dict[int, Track]:
        """Tracks by the index of their box."""
        if not self.tracks:
            return {}
        expected = torch.stack([track.box + track.motion for track in self.tracks])
        ious = pairwise_iou(Boxes(boxes), Boxes(expected))
        ious[torch.tensor(labels)[:, None] != torch.tensor([t.label for t in self.tracks])] = 0
        matched: dict[int, Track] = {}
        for pair in ious.flatten().argsort(descending=True, stable=True).tolist():
            index, number = divmod(pair, len(self.tracks))
            if ious[index, number] < self.min_iou:
                break
            if index not in matched and all(t is not self.tracks[number] for t in matched.values()):
                matched[index] = self.tracks[number]
        return matched

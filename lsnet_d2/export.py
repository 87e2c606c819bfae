"""Models as one file that runs without this package: an ONNX graph, or a program of torch.export.

What is traced is the model itself, from the pixels of an image of any size to its detections, with
normalisation, decoding and NMS. Letters: D detections, V landmarks of a branch.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .layers.pyramid_sampling import SOURCES_PER_LEVEL
from .modeling import LSNet
from .modeling.postprocessing import clip_boxes, selection_operator

# Of the image that is traced: no two levels have the same size, and none a side of one cell, for
# which torch would assume that it stays so.
_TRACED_SIZE = (283, 409)
_OPSET = 20
_CHUNK = 4
_MAX_SIDE = 1024


class DetectingModule(nn.Module):
    """A model as a function of tensors.

    Attributes:
        output_names: of the outputs: "boxes", "scores", "classes", and for each branch what it
            enters into ``Instances``, "extreme_points", "contours" or "keypoints".
    """

    def __init__(self, model: LSNet) -> None:
        super().__init__()
        self.model = model
        landmarks = [branch.pred_field.removeprefix("pred_") for branch in model.branches]
        self.output_names = ["boxes", "scores", "classes", *landmarks]

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """
        Args:
            image: (3, H, W), of any type, 0 to 255, its channels in the order of ``INPUT.FORMAT``.

        Returns:
            Boxes (D, 4) XYXY, scores (D,), classes (D,) from 0, best first, and of each branch the
            landmarks (D, V, 2); keypoints (D, V, 3) with a score. In pixels of ``image`` and
            clipped to it. Boxes may be empty or inverted.
        """
        model = self.model
        size = tuple(image.shape[-2:])
        pixels = (image - model.pixel_mean) / model.pixel_std
        divisor = model.backbone.size_divisibility
        down, right = ((side + divisor - 1) // divisor * divisor - side for side in size)
        pixels = F.pad(pixels, (0, right, 0, down))
        boxes, scores, classes, landmarks = model.detect(*model.predict(pixels[None]), 0, size)
        clipped = [
            branch.prediction(places, scores, classes, size)
            for branch, places in zip(model.branches, landmarks, strict=True)
        ]
        return clip_boxes(boxes, size), scores, classes, *clipped


@torch.no_grad()
def export_program(model: LSNet) -> ExportedProgram:
    """The model as a program for images of any size, on the device of the model."""
    module = DetectingModule(model).eval()
    image = torch.zeros(3, *_TRACED_SIZE, dtype=torch.uint8, device=model.device)
    sizes = {"image": {1: Dim.DYNAMIC, 2: Dim.DYNAMIC}}
    return torch.export.export(module, (image,), dynamic_shapes=sizes)


@torch.no_grad()
def export_onnx(model: LSNet):
    module = DetectingModule(model).eval()
    image = torch.zeros(3, *_TRACED_SIZE, dtype=torch.uint8, device=model.device)
    program = torch.onnx.export(
        module,
        (image,),
        input_names=["image"],
        output_names=module.output_names,
        dynamic_shapes={"image": {1: "height", 2: "width"}},
        custom_translation_table=_translations(),
        opset_version=_OPSET,
        dynamo=True,
        external_data=False,
    )
    return program


def _translations():
    from onnxscript import opset20 as op

    def select(boxes, scores, score_thresh: float, nms_thresh: float, max_detections: int):
        low, high = op.Split(boxes, axis=1, num_outputs=2)
        # Inverted boxes overlap with none; the operator would turn them round.
        side = op.ReduceMin(op.Sub(high, low), op.Constant(value_ints=[1]), keepdims=1)
        boxes = op.Where(op.Greater(side, op.Constant(value_floats=[0.0])), boxes, op.Constant(value_floats=[0.0]))
        chosen = op.NonMaxSuppression(
            op.Unsqueeze(boxes, op.Constant(value_ints=[0])),
            op.Unsqueeze(op.Transpose(scores, perm=[1, 0]), op.Constant(value_ints=[0])),
            op.Constant(value_ints=[max_detections]),
            op.Constant(value_floats=[nms_thresh]),
            op.Constant(value_floats=[score_thresh]),
        )
        _, classes, points = op.Split(chosen, axis=1, num_outputs=3)
        scores = op.GatherND(scores, op.Concat(points, classes, axis=1))
        count = op.Min(op.Shape(scores), op.Constant(value_ints=[max_detections]))
        scores, best = op.TopK(scores, count)
        one = op.Constant(value_ints=[1])
        points = op.Gather(op.Squeeze(points, one), best)
        classes = op.Gather(op.Squeeze(classes, one), best)
        return points, classes, scores

    def sum_rows(table, rows, weights):
        # ONNX has no such operator; gathering all rows at once would take much memory.
        chunks = rows.shape[1] // _CHUNK
        one = op.Constant(value_ints=[1])
        parts = (
            [(rows, weights)]
            if chunks == 1
            else zip(
                op.Split(rows, axis=1, num_outputs=chunks),
                op.Split(weights, axis=1, num_outputs=chunks),
                strict=True,
            )
        )
        sums = [op.MatMul(op.Unsqueeze(w, one), op.Gather(table, r, axis=0)) for r, w in parts]
        return op.Squeeze(functools.reduce(op.Add, sums), one)

    def cummax(x, dim: int):
        # Maxima over twice as many cells in each step.
        rank = len(x.shape)
        axis = op.Constant(value_ints=[dim % rank])
        for shift in (2**step for step in range(_MAX_SIDE.bit_length())):
            pads = [0] * (2 * rank)
            pads[dim % rank] = shift
            moved = op.Pad(x, op.Constant(value_ints=pads), op.Constant(value_float=-math.inf))
            moved = op.Slice(moved, op.Constant(value_ints=[0]), op.Constant(value_ints=[-shift]), axis)
            x = op.Max(x, moved)
        return x, x  # the second stands for indices, which nobody uses

    def cumprod(x, dim: int):
        first, second, third = op.Split(x, axis=dim, num_outputs=SOURCES_PER_LEVEL)
        second = op.Mul(first, second)
        return op.Concat(first, second, op.Mul(second, third), axis=dim)

    return {
        torch.ops.lsnet_d2.select_detections.default: select,
        torch.ops.lsnet_d2.sum_rows.default: sum_rows,
        torch.ops.aten.cummax.default: cummax,
        torch.ops.aten.cumprod.default: cumprod,
    }

"""A model as one file that runs without this package: an ONNX graph, or a program of torch.export.

What is traced is the model itself, from the pixels of an image of any size to its detections, with
normalisation, decoding and NMS. Where ONNX has no operator for one of torch's, the translation is
here. Letters: D detections, V landmarks of a branch, K classes, P points.
"""

import functools
import io
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import Metadata
from torch import Tensor, nn
from torch.export import Dim

from .errors import UserError
from .layers.pyramid_sampling import SOURCES_PER_LEVEL
from .modeling import LSNet

# Of the image that is traced: all levels differ in size, and none has a side of one cell, which
# torch would take for constant.
_TRACED_SIZE = (283, 409)
# The first with deformable convolution is 19.
_OPSET = 20
# Rows that are gathered at once for each sum.
_CHUNK = 4
# The longest row that corner pooling runs along, in cells.
_MAX_CELLS = 4096


class DetectingModule(nn.Module):
    """A model as a function of tensors.

    Attributes:
        output_names: "boxes", "scores", "classes", and what each branch enters into ``Instances``:
            "extreme_points", "contours" or "keypoints", with their scores. Instead of contours that
            the model traces along masks these, "masks" and "mask_boxes".
    """

    def __init__(self, model: LSNet) -> None:
        """
        Raises:
            UserError: the model is none that can be exported.
        """
        super().__init__()
        if not isinstance(model, LSNet):
            raise UserError(f"only LSNet can be exported, not {type(model).__name__}")
        if model.backbone.padding_constraints.get("square_size", 0):
            raise UserError("a model whose images are padded to squares cannot be exported")
        self.model = model
        self.output_names = ["boxes", "scores", "classes"]
        for branch in model.branches:
            traced = ["masks", "mask_boxes"] if branch.traced_points else []
            self.output_names += traced or [branch.pred_field.removeprefix("pred_")]
            if branch.score_field != "scores":
                self.output_names.append(branch.score_field)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """
        Args:
            image: (3, H, W) uint8, channels in the order of ``INPUT.FORMAT``.

        Returns:
            Boxes (D, 4) XYXY, scores (D,), classes (D,) from 0, best first, and of each branch the
            landmarks (D, V, 2); keypoints (D, V, 3) with a score; of contours and keypoints then
            their scores (D,). In pixels of ``image``, clipped to it. There may be boxes without
            area. Of masks the probabilities (D, K, K), in cells that fill boxes whose upper left
            and lower right corners (D, 2, 2) may lie outside the image.
        """
        model = self.model
        size = tuple(image.shape[-2:])
        pixels = (image - model.pixel_mean) / model.pixel_std
        divisor = max(model.backbone.size_divisibility, 1)
        down, right = ((side + divisor - 1) // divisor * divisor - side for side in size)
        pixels = F.pad(pixels, (0, right, 0, down))
        found = model.detect(*model.predict(pixels[None]), 0, size)
        boxes, scores, classes, landmarks, landmark_scores, masks = found
        predictions = []
        for branch, places, own, mask in zip(
            model.branches, landmarks, landmark_scores, masks, strict=True
        ):
            places, own = branch.prediction(places, own, classes, size)
            if mask is None:
                predictions.append(places)
            else:
                predictions += [mask.probabilities, mask.lattice.boxes.unflatten(1, (2, 2))]
            if branch.score_field != "scores":
                predictions.append(own.clone())
        return boxes, scores, classes, *predictions


def describe(cfg: CfgNode, metadata: Metadata | None) -> dict[str, str]:
    """What a user of the file has to know, as names and JSON.

    "input_format", "min_size", "max_size" (resize the shorter side of an image to the former unless
    the longer one would exceed the latter; 0: leave it as it is), "score_threshold",
    "nms_threshold", "max_detections", "min_box_area" (in pixels of the image before resizing;
    smaller boxes are to be dropped), "class_names", "keypoint_names" and "skeleton" (pairs of
    keypoints, from 0). Where names are unknown, they are numbers.
    """
    metadata = metadata or Metadata()
    classes = list(metadata.get("thing_classes") or map(str, range(cfg.MODEL.LSNET.NUM_CLASSES)))
    keypoints = list(
        metadata.get("keypoint_names") or map(str, range(cfg.MODEL.LSNET.NUM_KEYPOINTS))
    )
    bones = metadata.get("keypoint_connection_rules") or []
    description = {
        "input_format": cfg.INPUT.FORMAT,
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        "score_threshold": cfg.MODEL.LSNET.SCORE_THRESH_TEST,
        "nms_threshold": cfg.MODEL.LSNET.NMS_THRESH_TEST,
        "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
        "min_box_area": cfg.MODEL.LSNET.MIN_BOX_AREA_TEST,
        "class_names": classes,
        "keypoint_names": keypoints,
        "skeleton": [[keypoints.index(a), keypoints.index(b)] for a, b, _ in bones],
    }
    return {name: json.dumps(value) for name, value in description.items()}


@torch.no_grad()
def export_program(model: LSNet, description: dict[str, str]) -> bytes:
    """What ``torch.export.load`` reads; its module takes an image as :class:`DetectingModule`.

    Each side of the image must have 129 pixels or more, so that no level has a side of one cell,
    when the strides are 8 to 128. Loading needs ``import lsnet_d2``, which
    defines two operators.

    Args:
        model: in evaluation mode.
        description: see :func:`describe`; it becomes the extra file "description.json".
    """
    module, image = _traced(model)
    sides = {"image": {1: Dim.DYNAMIC, 2: Dim.DYNAMIC}}
    with _tracing():
        program = torch.export.export(module, (image,), dynamic_shapes=sides)
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"description.json": json.dumps(description)})
    return file.getvalue()


@torch.no_grad()
def export_onnx(model: LSNet, description: dict[str, str]) -> bytes:
    """An ONNX model: input ``image``, outputs as :class:`DetectingModule` has them.

    Args:
        model: in evaluation mode.
        description: see :func:`describe`; it becomes the model's metadata.

    Raises:
        UserError: a package of the extra "export" is missing.
    """
    try:
        translations = onnx_translations()
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is missing: pip install -e '.[export]'") from error
    module, image = _traced(model)
    with warnings.catch_warnings(), _tracing():
        warnings.simplefilter("ignore", FutureWarning)  # of the exporter about itself
        program = torch.onnx.export(
            module,
            (image,),
            input_names=["image"],
            output_names=module.output_names,
            dynamic_shapes={"image": {1: "height", 2: "width"}},
            custom_translation_table=translations,
            opset_version=_OPSET,
            verbose=False,
        )
    program.model.metadata_props.update(description)
    return program.model_proto.SerializeToString()


def _traced(model: LSNet) -> tuple[DetectingModule, Tensor]:
    """The module, and an image for it."""
    image = torch.zeros(3, *_TRACED_SIZE, dtype=torch.uint8, device=model.device)
    return DetectingModule(model).eval(), image


@contextmanager
def _tracing() -> Iterator[None]:
    """Attention is made of operators that can be translated; where in the code each operator comes
    from is not recorded, which takes most of the time, and would put paths into the file."""
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    no_traces = torch.fx.config.do_not_emit_stack_traces
    torch.backends.mha.set_fastpath_enabled(False)
    torch.fx.config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)
        torch.fx.config.do_not_emit_stack_traces = no_traces


def onnx_translations() -> dict[Callable, Callable]:
    """Functions of onnxscript, by the operators of torch that they stand for."""
    from onnxscript import opset20 as op

    def ints(*values: int):
        return op.Constant(value_ints=values)

    def floats(*values: float):
        return op.Constant(value_floats=values)

    def select_detections(boxes, scores, score_thresh, nms_thresh, max_detections):
        low, high = op.Split(boxes, axis=1, num_outputs=2)
        # Inverted boxes overlap with none. ONNX would turn them round.
        side = op.ReduceMin(op.Sub(high, low), ints(1))
        boxes = op.Where(op.Greater(side, floats(0.0)), boxes, floats(0.0))
        chosen = op.NonMaxSuppression(
            op.Unsqueeze(boxes, ints(0)),
            op.Unsqueeze(op.Transpose(scores, perm=[1, 0]), ints(0)),
            ints(max_detections),  # of each class, so that none of the best is missing
            floats(nms_thresh),
            floats(score_thresh),
        )
        _, classes, points = op.Split(chosen, axis=1, num_outputs=3)
        scores = op.GatherND(scores, op.Concat(points, classes, axis=1))
        scores, best = op.TopK(scores, op.Min(op.Shape(scores), ints(max_detections)))
        points, classes = (op.Gather(op.Squeeze(x, ints(1)), best) for x in (points, classes))
        return points, classes, scores

    def sum_rows(table, rows, weights):
        count = rows.shape[1] // _CHUNK
        parts = [(rows, weights)]
        if count > 1:
            split = (op.Split(x, axis=1, num_outputs=count) for x in (rows, weights))
            parts = zip(*split, strict=True)
        sums = [op.MatMul(op.Unsqueeze(w, ints(1)), op.Gather(table, r)) for r, w in parts]
        return op.Squeeze(functools.reduce(op.Add, sums), ints(1))

    def cummax(x, dim):
        # Each step doubles the cells that a maximum is over.
        rank = len(x.shape)
        axis = dim % rank
        for step in range(_MAX_CELLS.bit_length() - 1):
            pads = [0] * (2 * rank)
            pads[axis] = 2**step
            moved = op.Pad(x, ints(*pads), op.Constant(value_float=-math.inf))
            x = op.Max(x, op.Slice(moved, ints(0), ints(-(2**step)), ints(axis)))
        return x, op.Shape(x)  # instead of the places of the maxima, which nobody uses

    def cumprod(x, dim):
        first, second, third = op.Split(x, axis=dim, num_outputs=SOURCES_PER_LEVEL)
        second = op.Mul(first, second)
        return op.Concat(first, second, op.Mul(second, third), axis=dim)

    return {
        torch.ops.lsnet_d2.select_detections.default: select_detections,
        torch.ops.lsnet_d2.sum_rows.default: sum_rows,
        torch.ops.aten.cummax.default: cummax,
        torch.ops.aten.cumprod.default: cumprod,
    }


def load_onnx(data: bytes, *, threads: int = 0) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """A function like :class:`DetectingModule` that ONNX Runtime computes on the CPU.

    Args:
        threads: that compute; 0: as many as ONNX Runtime chooses.

    Raises:
        UserError: ONNX Runtime is missing, or too old for an operator of the model.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is missing: pip install -e '.[export]'") from error
    try:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        providers = ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(data, options, providers=providers)
    except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented as error:
        raise UserError(f"onnxruntime {onnxruntime.__version__} is too old: {error}") from error
    return lambda image: tuple(map(torch.from_numpy, session.run(None, {"image": image.numpy()})))


def load_program(data: bytes) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """A function like :class:`DetectingModule` from :func:`export_program`'s bytes.

    It raises a UserError for an image that is too small.
    """
    program = torch.export.load(io.BytesIO(data)).module()

    def run(image: Tensor) -> tuple[Tensor, ...]:
        try:
            return program(image)
        except AssertionError as error:  # of the sizes that the program was made for
            height, width = image.shape[1:]
            raise UserError(
                f"the program does not take an image of {height} x {width}: {error}"
            ) from error

    return run


@dataclass
class Comparison:
    """Detections of two models in one image.

    Attributes:
        count: of detections that both have.
        missing: detections that only one of them has, although their scores are not among the
            lowest, where the next one may replace them; all, if they have none in common.
        differences: the largest, of each output.
    """

    count: int
    missing: int
    differences: dict[str, float]


def compare(
    names: Sequence[str], expected: Sequence[Tensor], actual: Sequence[Tensor], *, near: float = 1.0
) -> Comparison:
    """Find each detection among the other model's. Their order does not matter.

    Args:
        names: of the outputs of :class:`DetectingModule`.
        expected, actual: the outputs.
        near: pixels, or hundredths of a score, by which the same detection may differ.
    """
    (boxes, scores, classes), (others, other_scores, other_classes) = expected[:3], actual[:3]
    cost = (boxes[:, None] - others).abs().amax(dim=2)
    cost = torch.maximum(cost, 100 * (scores[:, None] - other_scores).abs())
    cost = cost.masked_fill(classes[:, None] != other_classes, math.inf)
    pairs = []
    for _ in range(min(cost.shape)):
        best = int(cost.argmin())
        row, column = divmod(best, cost.shape[1])
        if not cost[row, column] <= near:
            break
        pairs.append((row, column))
        cost[row], cost[:, column] = math.inf, math.inf
    rows, columns = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
    lowest = min((float(x.min()) for x in (scores, other_scores) if len(x)), default=0.0)
    missing = 0
    for values, found in ((scores, rows), (other_scores, columns)):
        alone = torch.ones_like(values, dtype=torch.bool)
        alone[found] = False
        missing += int((alone & ((values > lowest + near / 100) | (not pairs))).sum())
    differences = {
        name: float((x[rows].double() - y[columns].double()).abs().max()) if pairs else 0.0
        for name, x, y in zip(names, expected, actual, strict=True)
    }
    return Comparison(len(pairs), missing, differences)

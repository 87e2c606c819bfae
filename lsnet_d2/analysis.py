"""What a model costs: parameters, floating point operations, activations.

One multiply-add counts as one operation, as in fvcore. Counted are convolutions, matrix products,
norms, the upsampling of the pyramid, and sampling with bilinear weights, at four multiply-adds a
value. A deformable convolution is sampling and a matrix product, and what is counted is what runs
on a CPU: a place that is looked at from three levels is projected once. Not counted are activation
functions and other elementwise operations, the making of bilinear weights, sorting and NMS.
"""

import math
from typing import Any

import torch
from detectron2.export import TracingAdapter
from detectron2.utils.analysis import FlopCountAnalysis
from fvcore.nn import ActivationCountAnalysis
from fvcore.nn.jit_handles import generic_activation_jit, get_shape
from torch import nn

_ROW_SUM = "aten::embedding_bag"


def count_flops(model: nn.Module, height: int, width: int) -> FlopCountAnalysis:
    """Operations of inference on one image, by module and operator.

    Args:
        model: a detector of Detectron2's kind, in evaluation mode, on a CPU.
        height, width: of the image, whose pixels are random.
    """
    analysis = FlopCountAnalysis(model, _inputs(height, width))
    analysis.set_op_handle(_ROW_SUM, _row_sum_flops)
    return _quiet(analysis)


def count_activations(model: nn.Module, height: int, width: int) -> ActivationCountAnalysis:
    """Values that convolutions, matrix products and sampling put out, by module and operator.

    Args:
        model, height, width: see :func:`count_flops`.
    """
    wrapped = TracingAdapter(model, _inputs(height, width), allow_non_tensor=True)
    analysis = ActivationCountAnalysis(wrapped, wrapped.flattened_inputs)
    analysis.set_op_handle(_ROW_SUM, generic_activation_jit())
    return _quiet(analysis)


def _inputs(height: int, width: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
    return [{"image": image}]


def _quiet(analysis: Any) -> Any:
    """What is not counted is stated once, above, and not with every model."""
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return analysis.tracer_warnings("none")


def _row_sum_flops(inputs: list, outputs: list) -> int:
    """Each row that is taken of a table (R, C) is multiplied by its weight and added."""
    _, channels = get_shape(inputs[0])
    return math.prod(get_shape(inputs[1])) * channels

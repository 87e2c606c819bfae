"""Weighted sums of table rows, the one primitive under all sampling layers.

A deformable convolution is linear in the features, so its taps can be projected first, for every
pixel at once (one matrix product), and sampled afterwards. What is left is a sum of a few weighted
rows for every output, which :func:`torch.nn.functional.embedding_bag` does in one pass without
storing the samples.
"""

from collections.abc import Callable
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor


class RowIndex:
    """Which rows of a table go into each sum, with the transposed index made at most once.

    Several sums may share one index (class and landmark features are sampled at the same places);
    its transpose, needed in their backward passes, costs a sort.

    Args:
        rows: (M, T) int32 or int64, the T rows of each of the M sums, all within ``num_rows``.
        num_rows: number of rows of the table.
    """

    def __init__(self, rows: Tensor, num_rows: int) -> None:
        self.rows = rows
        self.num_rows = num_rows

    @cached_property
    def transposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """``order`` (M*T,): terms sorted by row; ``sums``: the sum that each of them belongs to;
        ``starts`` (num_rows,): where each row's terms begin."""
        sorted_rows, order = torch.sort(self.rows.reshape(-1))
        every_row = torch.arange(self.num_rows, dtype=sorted_rows.dtype, device=sorted_rows.device)
        starts = torch.searchsorted(sorted_rows, every_row).to(sorted_rows.dtype)
        sums = torch.div(order, self.rows.shape[1], rounding_mode="floor")
        return order, sums.to(sorted_rows.dtype), starts


def weighted_row_sum(table: Tensor, index: RowIndex, weights: Tensor) -> Tensor:
    """``out[m] = sum_t weights[m, t] * table[index.rows[m, t]]``.

    Args:
        table: (R, C) with R equal to ``index.num_rows``.
        index: the rows of the M sums.
        weights: (M, T), same dtype as ``table``.

    Returns:
        (M, C). Differentiable once in ``table`` and ``weights``.
    """
    return weighted_sum_of_made_rows(lambda table: table, (table,), index, weights)


def weighted_sum_of_made_rows(
    make: Callable[..., Tensor], inputs: tuple[Tensor, ...], index: RowIndex, weights: Tensor
) -> Tensor:
    """:func:`weighted_row_sum` of a table that is larger than what it is made from.

    The table is not kept for the backward pass, which makes it anew.

    Args:
        make: ``inputs`` to the table (R, C), differentiably.
        inputs: all tensors that the table depends on.
        index, weights: see :func:`weighted_row_sum`; weights of another dtype are converted.

    Returns:
        (M, C). Differentiable once in ``inputs`` and ``weights``.
    """
    if not torch.is_grad_enabled():  # an operator that can be traced, of the same value
        table = make(*inputs)
        return _sum_rows(table, index, weights.to(table.dtype))
    return _WeightedRowSum.apply(make, index, weights, *inputs)


def _sum_rows(table: Tensor, index: RowIndex, weights: Tensor) -> Tensor:
    if torch.compiler.is_exporting():
        return row_sum_operator(table, index.rows, weights)
    return F.embedding_bag(index.rows, table, mode="sum", per_sample_weights=weights)


@torch.library.custom_op("lsnet_d2::sum_rows", mutates_args=())
def row_sum_operator(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """The sums as one operator, which an export translates (``lsnet_d2/export.py``)."""
    return _sum_rows(table, RowIndex(rows, table.shape[0]), weights)


@row_sum_operator.register_fake
def _(table, rows, weights):
    return table.new_empty(rows.shape[0], table.shape[1])


class _WeightedRowSum(torch.autograd.Function):
    # PyTorch's own backward of embedding_bag sorts anew for each call and is several times slower
    # than its forward on a CPU; the transposed sum is a forward again.

    @staticmethod
    def forward(ctx, make: Callable, index: RowIndex, weights: Tensor, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(weights, *inputs)
        ctx.make, ctx.index = make, index
        device = inputs[0].device.type
        ctx.precision = partial(
            torch.autocast,
            device,
            dtype=torch.get_autocast_dtype(device),
            enabled=torch.is_autocast_enabled(device),
        )
        table = make(*inputs)
        return _sum_rows(table, index, weights.to(table.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        weights, *inputs = ctx.saved_tensors
        leaves = [
            x.detach().requires_grad_(needed)
            for x, needed in zip(inputs, ctx.needs_input_grad[3:], strict=True)
        ]
        with torch.enable_grad(), ctx.precision():
            table = ctx.make(*leaves)
        grad = grad.contiguous()
        grad_weights = None
        if ctx.needs_input_grad[2]:
            rows = table.detach()
            if rows.dtype is torch.bfloat16:  # for which CUDA has no kernel of this gradient
                rows = rows.float()
            with torch.enable_grad():
                leaf = weights.detach().requires_grad_()
                out = _sum_rows(rows, ctx.index, leaf.to(rows.dtype))
            (grad_weights,) = torch.autograd.grad(out, leaf, grad.to(out.dtype))
        if not table.requires_grad:
            return None, None, grad_weights, *(None for _ in inputs)
        order, sums, starts = ctx.index.transposed
        grad_table = F.embedding_bag(
            sums,
            grad,
            starts,
            mode="sum",
            per_sample_weights=weights.reshape(-1)[order].to(grad.dtype),
        )
        learned = [x for x in leaves if x.requires_grad]
        found = iter(torch.autograd.grad(table, learned, grad_table))
        return None, None, grad_weights, *(next(found) if x.requires_grad else None for x in leaves)

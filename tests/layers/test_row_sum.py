import pytest
import torch

from lsnet_d2.layers.row_sum import RowIndex, weighted_row_sum, weighted_sum_of_made_rows


def case(sums, terms, num_rows, channels=3):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(num_rows, (sums, terms), generator=generator, dtype=torch.int32)
    table = torch.randn(num_rows, channels, generator=generator, dtype=torch.double)
    weights = torch.randn(sums, terms, generator=generator, dtype=torch.double)
    return table.requires_grad_(), RowIndex(rows, num_rows), weights.requires_grad_()


@pytest.mark.parametrize(
    ("sums", "terms", "num_rows"), [(7, 4, 5), (1, 1, 1), (3, 2, 50), (0, 4, 5)]
)
def test_value(sums, terms, num_rows):
    table, index, weights = case(sums, terms, num_rows)
    expected = (weights[..., None] * table[index.rows.long()]).sum(1)
    torch.testing.assert_close(weighted_row_sum(table, index, weights), expected)
    with torch.no_grad():
        torch.testing.assert_close(weighted_row_sum(table, index, weights), expected)


@pytest.mark.parametrize(("sums", "terms", "num_rows"), [(7, 4, 5), (3, 2, 20)])
def test_gradient(sums, terms, num_rows):
    table, index, weights = case(sums, terms, num_rows)
    assert torch.autograd.gradcheck(
        lambda table, weights: weighted_row_sum(table, index, weights), (table, weights)
    )


def test_rows_that_no_sum_uses_get_zero_gradient():
    table, _, weights = case(2, 2, 9)
    index = RowIndex(torch.tensor([[0, 0], [8, 8]], dtype=torch.int32), 9)
    weighted_row_sum(table, index, weights).sum().backward()
    used = table.grad.abs().sum(1) > 0
    assert used.nonzero().flatten().tolist() == [0, 8]


def test_one_index_serves_several_sums():
    table, index, weights = case(7, 4, 5)
    (
        weighted_row_sum(table, index, weights) + weighted_row_sum(2 * table, index, weights)
    ).sum().backward()
    expected = torch.zeros_like(table)
    expected.index_add_(
        0, index.rows.long().flatten(), (3 * weights).flatten()[:, None].expand(-1, 3)
    )
    torch.testing.assert_close(table.grad, expected)


def made_rows(columns, projection):
    """Twice as many rows as there are ``columns``."""
    return torch.cat([columns @ projection, columns @ projection.square()])


def made_case():
    _, index, weights = case(7, 4, 10)
    generator = torch.Generator().manual_seed(1)
    columns, projection = (
        torch.randn(size, generator=generator, dtype=torch.double, requires_grad=True)
        for size in ((5, 2), (2, 3))
    )
    return columns, projection, index, weights


def test_made_rows_have_the_value_and_gradients_of_a_table():
    columns, projection, index, weights = made_case()
    inputs = (columns, projection, weights)
    expected = weighted_row_sum(made_rows(columns, projection), index, weights)
    out = weighted_sum_of_made_rows(made_rows, (columns, projection), index, weights)
    torch.testing.assert_close(out, expected)
    grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("learned", [0, 1, 2])
def test_made_rows_where_one_input_is_learned(learned):
    columns, projection, index, weights = made_case()
    inputs = [x.detach() for x in (columns, projection, weights)]
    inputs[learned].requires_grad_()
    weighted_sum_of_made_rows(made_rows, (*inputs[:2],), index, inputs[2]).sum().backward()
    assert inputs[learned].grad.abs().sum() > 0
    assert [x.grad is None for x in inputs] == [i != learned for i in range(3)]


def test_made_rows_are_not_kept():
    columns, projection, index, weights = made_case()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape), lambda x: x):
        weighted_sum_of_made_rows(made_rows, (columns, projection), index, weights)
    assert sorted(kept) == [(2, 3), (5, 2), (7, 4)]


def test_made_rows_under_autocast():
    columns, projection, index, weights = (
        x.detach().float().requires_grad_() if isinstance(x, torch.Tensor) else x
        for x in made_case()
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = weighted_sum_of_made_rows(made_rows, (columns, projection), index, weights)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert {x.grad.dtype for x in (columns, projection, weights)} == {torch.float32}
    expected = weighted_row_sum(made_rows(columns, projection), index, weights)
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.1)

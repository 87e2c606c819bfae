import pytest
import torch

from lsnet_d2.layers.row_sum import RowIndex, weighted_row_sum


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

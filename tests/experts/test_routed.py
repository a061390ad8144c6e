"""Routed experts on one process are the dense form, forward and backward, whatever is chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import autofunc as af
from autofunc.errors import ModelError
from autofunc.experts import grouped_linear, grouped_matmul, grouped_rows
from tests.experts.cases import SIZES, dense, gradients, make_case, routed


@pytest.mark.parametrize("size", SIZES)
def test_equals_all_experts_on_all_tokens(size: tuple[Any, ...]) -> None:
    compare(*size)


@given(st.integers(1, 20), st.integers(1, 9), st.data())
def test_equals_them_for_any_sizes(tokens: int, count: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, count))
    compare(tokens, count, k, data.draw(st.sampled_from(["any", "first", "last"])), data.draw(st.integers(0, 99)))


def compare(tokens: int, count: int, k: int, choose: str, seed: int = 0) -> None:
    x, chosen, weights, params = make_case(tokens, count, k, choose, seed)
    leaves = [x, weights, *params.values()]
    expected, found = (form(x, chosen, weights, params, count) for form in (dense, routed))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(gradients(expected, leaves), gradients(found, leaves), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-11, atol=1e-12)


def test_rows_behind_the_last_end_are_of_nobody() -> None:
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    x, weight, table = (torch.randn(size, dtype=torch.float64) for size in ((7, 3), (3, 4, 3), (3, 4)))
    for leaf in (x, weight, table):
        leaf.requires_grad_()
    owner = torch.tensor([0, 0, 2, 2, 2])
    inside = torch.einsum("ri,roi->ro", x[:5], weight[owner])
    for made in (grouped_linear(x, weight, ends), grouped_matmul(x, weight.transpose(1, 2).contiguous(), ends)):
        torch.testing.assert_close(made, torch.cat([inside, inside.new_zeros(2, 4)]))
    made = grouped_linear(x, weight, ends, table)
    torch.testing.assert_close(made, torch.cat([inside + table[owner], inside.new_zeros(2, 4)]))
    assert torch.equal(grouped_rows(table, ends, x)[:5], table[owner])
    cotangent = torch.randn(7, 4, dtype=torch.float64)
    expected = torch.autograd.grad(inside + table[owner], [x, weight, table], cotangent[:5])
    for one, other in zip(expected, torch.autograd.grad(made, [x, weight, table], cotangent), strict=True):
        torch.testing.assert_close(other, one)


def test_operators_are_what_torch_asks_of_them() -> None:
    """Schemas, fake tensors, gradients and `torch.compile`'s tracing, by torch's own checks."""
    ends = torch.tensor([1, 4], dtype=torch.int32)
    x, weight, turned, table = (
        torch.randn(size, requires_grad=True) for size in ((5, 3), (2, 4, 3), (2, 3, 4), (2, 3))
    )  # fmt: skip
    order = torch.tensor([2, 0, 1, 3, 4, 5])
    ops = torch.ops.autofunc
    by_pair = torch.randn(6, 2, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    for operator, arguments in (
        (ops.grouped_linear, (x, weight, ends)), (ops.grouped_matmul, (x, turned, ends)),
        (ops.grouped_outer, (x.detach(), torch.randn(5, 2), ends)), (ops.grouped_rows, (table, ends, x.detach())),
        (ops.grouped_sum, (x.detach(), ends)), (ops.copied_rows, (by_pair[1], order, order.argsort())),
        (ops.permuted_rows, (by_pair[0], order, order.argsort())),
    ):  # fmt: skip
        torch.library.opcheck(operator.default, arguments)


def test_shapes_that_do_not_fit() -> None:
    x, chosen, weights, params = make_case(4, 3, 2, "any")
    with pytest.raises(ModelError, match=r"routed_experts: expected x of \(tokens, width\)"):
        routed(x, chosen[:3], weights, params, 3)


def test_the_mean_on_one_process_is_the_value() -> None:
    x = torch.randn(3)
    assert af.mean_over_expert_ranks(x) is x

"""Rows of tokens sorted by their chosen experts, and restored to token order.

Each is the transpose of the other, so both gradients are gathers too, without colliding additions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

torch.library.define("autofunc::copied_rows", "(Tensor x, Tensor order, Tensor inverse) -> Tensor")
torch.library.define("autofunc::permuted_rows", "(Tensor x, Tensor order, Tensor inverse) -> Tensor")


class Order(NamedTuple):
    """The order of (token, choice) pairs sorted by expert; S = tokens * k pairs."""

    order: Tensor  # int64 (S,): the pair at each place; pair `n * k + j` is token n's choice j
    inverse: Tensor  # int64 (S,): the place of each pair
    counts: Tensor  # int64 (experts,): the number of pairs per expert


def order_of(chosen: Tensor, num_experts: int) -> Order:
    """Sort pairs by expert; pairs of the same expert keep the order of their tokens.

    Args:
        chosen: int64 (tokens, k), the chosen experts.
        num_experts: the model's experts, on all processes together.
    """
    pairs = chosen.reshape(-1)
    order = pairs.argsort(stable=True)
    inverse = torch.zeros_like(order).scatter(0, order, torch.arange(order.shape[0], device=order.device))
    counts = torch.zeros(num_experts, dtype=order.dtype, device=order.device).scatter_add(0, pairs, torch.ones_like(pairs))
    return Order(order, inverse, counts)


def copied_rows(x: Tensor, order: Order) -> Tensor:
    """Copy each pair's token, sorted by expert: (tokens, width) -> (S, width)."""
    made: Tensor = torch.ops.autofunc.copied_rows(x, order.order, order.inverse)
    return made


def sorted_back(x: Tensor, order: Order) -> Tensor:
    """Restore rows sorted by expert to the order of pairs: (S, width)."""
    made: Tensor = torch.ops.autofunc.permuted_rows(x, order.inverse, order.order)
    return made


@torch.library.impl("autofunc::copied_rows", "CompositeExplicitAutograd")
def _copied(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return x.index_select(0, order // (order.shape[0] // x.shape[0]))


@torch.library.impl("autofunc::permuted_rows", "CompositeExplicitAutograd")
def _permuted(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return x.index_select(0, order)


torch.library.register_fake(
    "autofunc::copied_rows", lambda x, order, inverse: x.new_empty(order.shape[0], x.shape[1])
)  # fmt: skip
torch.library.register_fake("autofunc::permuted_rows", lambda x, order, inverse: x.new_empty(x.shape))


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.num_tokens = inputs[0].shape[0]
    ctx.save_for_backward(inputs[1], inputs[2])


def _permuted_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    order, inverse = ctx.saved_tensors
    return torch.ops.autofunc.permuted_rows(grad, inverse, order), None, None


def _copied_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    by_pair = _permuted_backward(ctx, grad)[0]
    return by_pair.view(ctx.num_tokens, -1, grad.shape[1]).sum(1), None, None


torch.library.register_autograd("autofunc::copied_rows", _copied_backward, setup_context=_keep)
torch.library.register_autograd("autofunc::permuted_rows", _permuted_backward, setup_context=_keep)

"""The rows of tokens, sorted by the experts that were chosen for them, and back.

Each is the other's transpose, so both gradients are gathers like themselves, without additions that collide.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

torch.library.define("autofunc::copied_rows", "(Tensor x, Tensor order, Tensor inverse) -> Tensor")
torch.library.define("autofunc::permuted_rows", "(Tensor x, Tensor order, Tensor inverse) -> Tensor")


class Order(NamedTuple):
    """In which order pairs of a token and one of its experts are sorted by expert; S = tokens * k pairs."""

    order: Tensor  # int64 (S,): which pair comes at a place; pair `n * k + j` is token n's choice j
    inverse: Tensor  # int64 (S,): the place of each pair
    counts: Tensor  # int64 (experts,): how many pairs each expert has


def order_of(chosen: Tensor, num_experts: int) -> Order:
    """How pairs are sorted; those of one expert stay in the order of tokens.

    Args:
        chosen: int64 (tokens, k), numbers of experts.
        num_experts: how many there are, on all processes together.
    """
    pairs = chosen.reshape(-1)
    order = pairs.argsort(stable=True)
    inverse = torch.zeros_like(order).scatter(0, order, torch.arange(order.shape[0], device=order.device))
    counts = torch.zeros(num_experts, dtype=order.dtype, device=order.device).scatter_add(0, pairs, torch.ones_like(pairs))
    return Order(order, inverse, counts)


def copied_rows(x: Tensor, order: Order) -> Tensor:
    """The token of each pair, sorted by expert: (tokens, width) -> (S, width)."""
    made: Tensor = torch.ops.autofunc.copied_rows(x, order.order, order.inverse)
    return made


def sorted_back(x: Tensor, order: Order) -> Tensor:
    """Rows that are sorted by expert, in the order of pairs: (S, width)."""
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

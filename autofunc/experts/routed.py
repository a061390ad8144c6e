"""Routed experts: every token goes through its few chosen experts, whichever processes hold them.

    rows = the token of each (token, choice) pair, sorted by expert     `to_experts`
    made = the output of each row's expert                              the products of `products.py`, and all between them
    out  = weighted sums over the choices of each token                 `from_experts`

With S = tokens * k pairs this is k / E of the work of all experts on all tokens. No shape depends on the data. If experts
are spread over processes (`spread.ExpertExchange`), `to_experts` sends rows to the processes that hold their experts, and
`from_experts` brings the outputs back; no other code exchanges rows. So a function of rows between them is the same on one
process and on many, as long as it treats each row separately and works for any number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from autofunc.errors import ModelError
from autofunc.experts.products import grouped_linear, grouped_matmul
from autofunc.experts.rows import Order, copied_rows, order_of, sorted_back
from autofunc.spread import current_experts


@dataclass(frozen=True)
class Groups:
    """Rows sorted by expert, and products with their experts' matrices. See `routed_experts`."""

    ends: Tensor

    def linear(self, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply `functional.linear` to each row, with its expert's weight, (experts, out, in), and bias, (experts, out)."""
        return grouped_linear(rows, weight, self.ends, bias)

    def matmul(self, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Like `linear`, for weights of (experts, in, out)."""
        return grouped_matmul(rows, weight, self.ends, bias)


def routed_experts(
    x: Tensor, chosen: Tensor, weights: Tensor, num_experts: int, expert: Callable[[Tensor, Groups], Tensor]
) -> Tensor:
    """Return the weighted sum of each token's chosen experts.

    Each expert computes its own tokens only. No token is dropped, however many choose the same expert.

    Args:
        x: (tokens, width).
        chosen: int64 (tokens, k), k different experts for each token.
        weights: (tokens, k), their weights.
        num_experts: the model's experts, on all ranks together.
        expert: `expert(rows, groups) -> rows`: the experts' outputs for rows sorted by expert, (rows, width);
            `groups.linear(rows, weight)` multiplies each row by its expert's matrix. It must treat each row separately, and
            work for any number of rows.

    Returns:
        (tokens, width of the experts' outputs), in the dtype of x.

    Raises:
        ModelError: for shapes that do not fit each other.

    Example:
        def expert(rows, groups):
            gate, up = (groups.linear(rows, params[name]) for name in ("gate_proj", "up_proj"))
            return groups.linear(functional.silu(gate) * up, params["down_proj"])

        y = af.routed_experts(x, best, probability.gather(-1, best), num_experts=8, expert=expert)
    """
    if x.dim() != 2 or chosen.shape != weights.shape or chosen.shape[:-1] != x.shape[:1]:
        raise ModelError(
            "routed_experts: expected x of (tokens, width), chosen and weights of (tokens, k); got "
            f"{tuple(x.shape)}, {tuple(chosen.shape)} and {tuple(weights.shape)}"
        )
    rows, ends, *route = to_experts(x, chosen, num_experts)
    return from_experts(expert(rows, Groups(ends)), weights, *route).to(x.dtype)


def mean_over_expert_ranks(x: Tensor) -> Tensor:
    """Average a statistic of tokens over the ranks that share a layer's experts; differentiable.

    They compute the layer together, as one process with all of their tokens would: so a router's balance loss takes means
    over all of them. Returns `x` itself if this process has all experts, or if the ranks only share the tokens of the same
    rows (context parallelism), of which `x` is already the mean.
    """
    if _recording.get():
        marked: Tensor = MEAN(x)
        return marked
    exchange = current_experts()
    return x if exchange is None else exchange.mean(x)


def to_experts(x: Tensor, chosen: Tensor, num_experts: int) -> list[Tensor]:
    """Return the rows for this process's experts.

    Args:
        x: (tokens, width).
        chosen: int64 (tokens, k).
        num_experts: the model's experts, on all ranks together.

    Returns:
        Rows sorted by expert; the end of each expert's rows, int32; and three tensors for `from_experts`. With S pairs
        there are S rows on one process, and `ranks * S` over several: those that nobody sent are zeros, and come last.
    """
    if _recording.get():
        found: list[Tensor] = torch.ops.autofunc.to_experts(x, chosen, num_experts)
        return found
    return _to_experts(x, chosen, num_experts)


def _to_experts(x: Tensor, chosen: Tensor, num_experts: int) -> list[Tensor]:
    order = order_of(chosen, num_experts)
    rows, counts = copied_rows(x, order), order.counts
    own, exchange = counts, current_experts()
    if exchange is not None:
        counts = exchange.counts(counts)
        rows, own = exchange.dispatch(rows, counts)
    return [rows, own.cumsum(0).to(torch.int32), order.order, order.inverse, counts]


def from_experts(made: Tensor, weights: Tensor, order: Tensor, inverse: Tensor, counts: Tensor) -> Tensor:
    """Return the weighted sum over each token's choices, in the wider dtype of `made` and `weights`.

    Args:
        made: the experts' outputs for the rows of `to_experts`.
        weights: (tokens, k).
        order, inverse, counts: the last three results of `to_experts`.
    """
    if _recording.get():
        found: Tensor = torch.ops.autofunc.from_experts(made, weights, order, inverse, counts)
        return found
    return _from_experts(made, weights, order, inverse, counts)


def _from_experts(made: Tensor, weights: Tensor, order: Tensor, inverse: Tensor, counts: Tensor) -> Tensor:
    exchange = current_experts()
    if exchange is not None:
        made = exchange.combine(made, counts, order.shape[0])
    by_pair = sorted_back(made, Order(order, inverse, counts))
    return (by_pair.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(1)


# --- all three as operators that stand for them in graphs still to be rewritten; these have no gradients

_recording: ContextVar[bool] = ContextVar("recording", default=False)

torch.library.define("autofunc::to_experts", "(Tensor x, Tensor chosen, int num_experts) -> Tensor[]")
torch.library.define(
    "autofunc::from_experts", "(Tensor made, Tensor weights, Tensor order, Tensor inverse, Tensor counts) -> Tensor"
)
torch.library.define("autofunc::mean_over_expert_ranks", "(Tensor x) -> Tensor")
torch.library.impl("autofunc::to_experts", "CompositeExplicitAutograd", _to_experts)
torch.library.impl("autofunc::from_experts", "CompositeExplicitAutograd", _from_experts)
torch.library.impl("autofunc::mean_over_expert_ranks", "CompositeExplicitAutograd", torch.clone)
torch.library.register_fake("autofunc::to_experts", _to_experts)
torch.library.register_fake("autofunc::from_experts", _from_experts)
torch.library.register_fake("autofunc::mean_over_expert_ranks", torch.clone)

MEAN = torch.ops.autofunc.mean_over_expert_ranks.default
"""What stands for `mean_over_expert_ranks`."""

_REAL = {
    torch.ops.autofunc.to_experts.default: to_experts,
    torch.ops.autofunc.from_experts.default: from_experts,
    MEAN: mean_over_expert_ranks,
}


@contextmanager
def recorded_as_operators() -> Iterator[None]:
    """Record `to_experts`, `from_experts` and `mean_over_expert_ranks` as one operator each in graphs traced inside."""
    token = _recording.set(True)
    try:
        yield
    finally:
        _recording.reset(token)


def run_for_real(graph: fx.Graph) -> None:
    """Replace these operators in a finished graph by the functions that they stand for."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _REAL:
            node.target = _REAL[node.target]

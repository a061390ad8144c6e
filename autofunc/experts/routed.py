"""Routed experts: every token goes through the few that were chosen for it, whichever process has these.

    rows = the token of each (token, choice) pair, sorted by expert     `to_experts`
    made = what its expert makes of each row                            products of `products.py`, and what is between
    out  = weighted sums over the choices of each token                 `from_experts`

With S = tokens * k pairs this is k / E of the work of all experts on all tokens. No shape depends on the data. Where
experts are spread over processes (`spread.ExpertExchange`), `to_experts` sends rows to those that have the experts, and
`from_experts` brings back what these made: both are here and nowhere else. So a function of rows between them is the same
on one process and on many, as long as it treats rows apart and works for any number of them.
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
    """Rows sorted by expert: the products with what each expert has for its own. See `routed_experts`."""

    ends: Tensor

    def linear(self, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`functional.linear` of each row with its expert's weight, of (experts, out, in), and bias, (experts, out)."""
        return grouped_linear(rows, weight, self.ends, bias)

    def matmul(self, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The same for weights of (experts, in, out)."""
        return grouped_matmul(rows, weight, self.ends, bias)


def routed_experts(
    x: Tensor, chosen: Tensor, weights: Tensor, num_experts: int, expert: Callable[[Tensor, Groups], Tensor]
) -> Tensor:
    """The weighted sum of the chosen experts of each token.

    Each expert computes its own tokens only. No token is dropped, however many choose one expert.

    Args:
        x: (tokens, width).
        chosen: int64 (tokens, k), numbers of different experts.
        weights: (tokens, k), how much each counts.
        num_experts: of the model, on all ranks together.
        expert: `expert(rows, groups) -> rows`: what experts make of rows, (rows, width), each sorted to its own;
            `groups.linear(rows, weight)` multiplies each by its expert's matrix. It treats every row apart, and has to work
            for any number of rows.

    Returns:
        (tokens, what the experts make), in the dtype of x.

    Raises:
        ModelError: for shapes that do not fit.

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
    """The mean of a statistic of tokens over the ranks that share the experts of a layer; differentiable.

    They compute the layer together, as one process with all of their tokens would: so a router's balance loss is of means
    over all of them. `x` itself where a process has all experts.
    """
    exchange = current_experts()
    return x if exchange is None else exchange.sum(x) / exchange.size


def to_experts(x: Tensor, chosen: Tensor, num_experts: int) -> list[Tensor]:
    """Rows for the experts that this process has.

    Args:
        x: (tokens, width).
        chosen: int64 (tokens, k).
        num_experts: on all ranks together.

    Returns:
        Rows sorted by expert; where those of each expert end, int32; and three that `from_experts` takes. With S pairs
        there are S rows on one process, and `ranks * S` over several, of which those that nobody sent are zeros at the end.
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
    """The weighted sum over the choices of each token, in the wider dtype of both.

    Args:
        made: of the rows that `to_experts` gave.
        weights: (tokens, k).
        order, inverse, counts: what it gave besides.
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


# --- both as operators, which stand for them in graphs that are still to be rewritten; without gradients of their own

_recording: ContextVar[bool] = ContextVar("recording", default=False)

torch.library.define("autofunc::to_experts", "(Tensor x, Tensor chosen, int num_experts) -> Tensor[]")
torch.library.define(
    "autofunc::from_experts", "(Tensor made, Tensor weights, Tensor order, Tensor inverse, Tensor counts) -> Tensor"
)
torch.library.impl("autofunc::to_experts", "CompositeExplicitAutograd", _to_experts)
torch.library.impl("autofunc::from_experts", "CompositeExplicitAutograd", _from_experts)
torch.library.register_fake("autofunc::to_experts", _to_experts)
torch.library.register_fake("autofunc::from_experts", _from_experts)

_REAL = {torch.ops.autofunc.to_experts.default: to_experts, torch.ops.autofunc.from_experts.default: from_experts}


@contextmanager
def recorded_as_operators() -> Iterator[None]:
    """Inside, what sends rows to experts and back is one operator each, to whoever records a graph."""
    token = _recording.set(True)
    try:
        yield
    finally:
        _recording.reset(token)


def run_for_real(graph: fx.Graph) -> None:
    """Put the functions in the places of the operators that stood for them, once a graph is done."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _REAL:
            node.target = _REAL[node.target]

"""Experts of transformers are captured as routed experts: rows sorted by expert instead of a loop that data decides.

Modules of transformers look up the function that runs their experts in a public table (`transformers.integrations.moe`).
While a forward is exported, that table holds ours, which does the same with operators of `autofunc.experts`; the module is
not touched. Sending rows to experts and back are two operators in the graph, and plain functions in the layers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from autofunc import experts
from autofunc.captured.balance import MEAN
from autofunc.errors import ModelError
from autofunc.experts import grouped_linear, grouped_matmul, mean_over_expert_ranks
from autofunc.graph.lines import line_of

_THEIRS = "transformers.integrations.moe"
_REPLACED = ("eager", "grouped_mm", "batched_mm", "deepgemm", "sonicmoe", None)
"""Names in the table for the same computation; a function that a user added stays theirs."""


@contextmanager
def routed() -> Iterator[None]:
    """Inside, modules of transformers run their experts by `_forward`."""
    theirs: Any = sys.modules.get(_THEIRS)
    if theirs is None:
        yield
        return
    table, missing = theirs.ALL_EXPERTS_FUNCTIONS, object()
    before = {name: table.get(name, missing) for name in _REPLACED}
    for name in _REPLACED:
        table[name] = _forward
    try:
        yield
    finally:
        for name, function in before.items():
            del table[name]
            if table.get(name, missing) is not function:  # it had been set explicitly
                table[name] = function


def _forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute what `grouped_mm_experts_forward` of transformers 5.23 does, in its order, for all its modules' variants."""
    if self._is_expert_parallel:
        raise ModelError(
            f"{type(self).__name__} spreads its experts over processes itself (expert parallelism in transformers); "
            "load it without that"
        )
    product = grouped_matmul if self.is_transposed else grouped_linear
    rows, ends, *route = torch.ops.autofunc.to_experts(hidden_states, top_k_index, self.num_experts)

    def multiplied(rows: Tensor, name: str) -> Tensor:
        weight = getattr(self, name)
        return product(rows.to(weight.dtype), weight, ends, getattr(self, f"{name}_bias") if self.has_bias else None)

    made = self._apply_gate(multiplied(rows, "gate_up_proj")) if self.has_gate else self.act_fn(multiplied(rows, "up_proj"))
    made = multiplied(made, "down_proj")
    if self.has_post_expert_norm:
        made = self.post_expert_norm(made)
    return torch.ops.autofunc.from_experts(made, top_k_weights, *route).to(hidden_states.dtype)  # type: ignore[no-any-return]


_OF_EACH_EXPERT = {
    torch.ops.autofunc.grouped_linear.default: 1,
    torch.ops.autofunc.grouped_matmul.default: 1,
    torch.ops.autofunc.grouped_rows.default: 0,
}
"""Operators with an operand that has one entry per expert, and its position."""
_CONVERTED = (torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default)


def expert_parameters(graph: fx.Graph, params: Mapping[fx.Node, str], what: str) -> frozenset[str]:
    """Return the names of the parameters with one entry per routed expert, which processes may share out.

    Args:
        graph: of a captured forward.
        params: its placeholders that are parameters, by name.
        what: the module, for messages.

    Raises:
        ModelError: if experts multiply by something other than a parameter, or the parameter is also read elsewhere.
    """
    found: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if node.target in _OF_EACH_EXPERT:
            given = source = node.args[_OF_EACH_EXPERT[node.target]]
            while source.target in _CONVERTED:
                source = source.args[0]
            if source not in params:
                raise ModelError(
                    f"{what} computes what it multiplies experts by ({given.name}; {line_of(node)}), so its experts cannot "
                    "be spread over ranks; make it a parameter"
                )
            found[source] = params[source]
    for source, name in found.items():
        other = next(filter(None, (_other_user(source, user) for user in source.users)), None)
        if other is not None:
            raise ModelError(
                f"{what} also reads {name!r} of its experts elsewhere ({other.target}; {line_of(other)}), so its experts "
                "cannot be spread over ranks"
            )
    return frozenset(found.values())


def _other_user(value: fx.Node, user: fx.Node) -> fx.Node | None:
    """Return the first operator, from this user on, that uses a per-expert value except to multiply rows with it."""
    if user.target in _CONVERTED:
        return next(filter(None, (_other_user(user, each) for each in user.users)), None)
    place = _OF_EACH_EXPERT.get(user.target)  # type: ignore[call-overload]
    return None if place is not None and user.args[place] is value else user


def run_for_real(graph: fx.Graph) -> None:
    """Replace the operators that stood for functions by those functions, once an export is done."""
    experts.run_for_real(graph)
    for node in graph.nodes:
        if node.target is MEAN:
            node.target = mean_over_expert_ranks

"""Tell full values that all ranks use alike from shared ones, which each rank uses with its part of something else.

Of a shared value each rank has one term of the gradient. Terms are summed only where a shared value comes from one that is
not shared. So a value with shared uses alone is computed as shared, if its operands are.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from autofunc.experts import to_experts
from autofunc.graph.schema import is_operator
from autofunc.spreading.layouts import FULL, TERMS, Cut
from autofunc.spreading.propagate import Propagation, is_differentiable

Node = fx.Node
_aten = torch.ops.aten

_STRUCTURAL = {
    _aten.view, _aten.reshape, _aten._unsafe_view, _aten.flatten, _aten.transpose, _aten.permute, _aten.unsqueeze,
    _aten.squeeze, _aten.expand, _aten.contiguous, _aten.alias, _aten.to, _aten.clone, _aten.index, _aten.slice,
    _aten.select, _aten.t,
}  # fmt: skip
"""Operators that only rearrange elements: sharing before them shares once for all later uses."""


class Sharing:
    """The shared values of a propagation.

    Args:
        propagation: of all operators.
        terms: names of the parameters whose gradients ranks must have as terms; None for as few collectives as possible.

    Attributes:
        shared: nodes computed as shared; ranks have terms of the gradients of parameters among them.
        wanted: nodes that some user reads as shared.
        before: those of `wanted` that become shared by sharing their operands.
    """

    def __init__(self, propagation: Propagation, terms: Collection[str] | None = None) -> None:
        self._found, self._whole = propagation, propagation.whole
        self._order = [node for node in self._whole.nodes if node in self._whole.weighted]
        self.wanted: set[Node] = set()
        self.before: set[Node] = set()
        self._leads: dict[Node, bool] = {}
        self._look_back()
        self.shared: set[Node] = set()
        for node in self._order:
            if (
                is_differentiable(node)
                and self._is_full(node)
                and self._leads[node]
                and all(map(self._is_there, self._operands(node)))
            ):
                self.shared.add(node)
        params = [(node, name) for node, name in self._whole.params.items() if self._is_full(node)]
        self.shared |= {node for node, name in params if (self._is_used_shared(node) if terms is None else name in terms)}

    def _is_full(self, node: Node) -> bool:
        return self._found.layout(node) is FULL

    def _look_back(self) -> None:
        """Walk back from uses: find values with shared uses alone, and values wanted as shared."""
        for node in [*reversed(self._order), *self._whole.params]:
            users = [user for user in node.users if user in self._whole.weighted and user in self._leads]
            self._leads[node] = node not in self._whole.kept and all(self._takes_shared(user) for user in users)
            if self._is_full(node) and any(self._wants_shared(user, node) for user in users):
                self.wanted.add(node)
            if node.target is to_experts and not self.wanted.isdisjoint(node.users):
                self.wanted.add(node.args[0])  # type: ignore[arg-type]  # there are fewer tokens than rows
            if node in self.wanted and _is_structural(node) and self._is_full(node.args[0]):  # type: ignore[arg-type]
                source: Any = node.args[0]
                if source in self._whole.weighted:
                    self.before.add(node)
                    self.wanted.add(source)

    def _takes_shared(self, user: Node) -> bool:
        if not is_differentiable(user) or user in self._found.outcomes:
            return True
        return self._is_full(user) and self._leads[user]

    def _wants_shared(self, user: Node, node: Node) -> bool:
        outcome = self._found.outcomes.get(user)
        return outcome is not None and any(want.node is node and want.layout is FULL for want in outcome.wants)

    def _operands(self, node: Node) -> list[Node]:
        return [each for each in node.all_input_nodes if each in self._whole.weighted and is_differentiable(each)]

    def _is_there(self, operand: Node) -> bool:
        """True if an operand is available as shared, without a sum of gradients for this use alone."""
        if operand in self._whole.params:
            return True
        layout = self._found.layout(operand)
        if layout is TERMS:
            return False
        return not self._is_full(operand) or operand in self.shared or operand in self.wanted

    def _is_used_shared(self, param: Node) -> bool:
        return any(
            user in self.shared or user in self.before or self._wants_shared(user, param) or self._wants_part(user, param)
            for user in param.users
        )

    def _wants_part(self, user: Node, node: Node) -> bool:
        outcome = self._found.outcomes.get(user)
        return outcome is not None and any(want.node is node and isinstance(want.layout, Cut) for want in outcome.wants)


def _is_structural(node: Node) -> bool:
    packet = getattr(node.target, "overloadpacket", None)
    return is_operator(node) and packet in _STRUCTURAL and isinstance(node.args[0], Node)

"""Refusal of forwards that decide by a random number, unless every draw leads the same way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from autofunc.decisions import is_check
from autofunc.errors import ModelError
from autofunc.graph.reach import ancestors
from autofunc.graph.schema import is_mutable, is_random, name_of

Node = fx.Node

_aten = torch.ops.aten

_DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout", "scaled_dot_product_attention")
_BELOW = (_aten.lt.Scalar, _aten.le.Scalar)
_ABOVE = (_aten.gt.Scalar, _aten.ge.Scalar)


def refuse_decided_draws(graph: fx.Graph, what: str) -> None:
    """Refuse decisions on random numbers; those that turn out the same for every draw are erased, and need no check.

    Raises:
        ModelError: naming the user's line.
    """
    for check in [node for node in graph.nodes if is_check(node)]:
        drawn = [node for node in ancestors([check]) if is_random(node) and not _drops(node)]
        if not drawn:
            continue
        if not _is_settled(check, drawn):
            raise ModelError(
                f"{what} decides by a random number ({check.args[3]}), and a captured forward has one path; set the "
                "probability to 0 (layerdrop=0), or put the module in eval mode"
            )
        before = ancestors([check])
        for node in reversed(list(graph.nodes)):
            if node is check or (node in before and node.op == "call_function" and not node.users and not is_mutable(node)):
                graph.erase_node(node)


def _drops(node: Node) -> bool:
    return name_of(node).rstrip("_") in _DROPOUTS


def _is_settled(check: Node, drawn: Sequence[Node]) -> bool:
    """True if it compares a number in [0, 1) with a bound outside that range."""
    found: Any = check.args[0]
    while found.target in (_aten.detach.default, _aten.alias.default):
        found = found.args[0]
    if (
        found.target not in (*_BELOW, *_ABOVE)
        or found.args[0] not in drawn
        or found.args[0].target is not _aten.rand.default
    ):
        return False
    bound = found.args[1]
    inside = 0 < bound < 1 or (bound == 0 and found.target in (_aten.le.Scalar, _aten.gt.Scalar))
    return not inside

"""The table of rules, by operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from autofunc.graph.schema import is_operator, is_pointwise
from autofunc.spreading.operation import Rule

RULES: dict[Any, Rule] = {}
"""Operators (all overloads of `aten.view`) and functions -> what becomes of them where operands are cut."""

LINEAR: dict[Any, Rule] = {}
"""Likewise where operands are terms of a sum, which stay terms."""

NAMED: dict[str, Rule] = {}
"""Operators of other libraries, which may not be there: `RULES` by "namespace.name"."""

POINTWISE: list[Rule] = []
"""The rule of all operators that torch marks as pointwise."""


def rule(*operators: Any, linear: bool = False) -> Callable[[Rule], Rule]:
    """Enter a rule."""

    def enter(function: Rule) -> Rule:
        (LINEAR if linear else RULES).update(dict.fromkeys(operators, function))
        return function

    return enter


def rule_of(node: fx.Node, linear: bool = False) -> Rule | None:
    """The rule of a node's operator; None where there is none."""
    packet = getattr(node.target, "overloadpacket", node.target) if is_operator(node) else node.target
    found = (LINEAR if linear else RULES).get(packet) or (None if linear else NAMED.get(str(packet)))
    return POINTWISE[0] if found is None and not linear and is_pointwise(node) else found

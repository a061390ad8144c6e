"""The table of rules, by operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from autofunc.graph.schema import is_operator, is_pointwise
from autofunc.spreading.operation import Rule

RULES: dict[Any, Rule] = {}
"""Operators (a packet such as `aten.view` stands for all overloads) and functions -> the rule for cut operands."""

LINEAR: dict[Any, Rule] = {}
"""Likewise for operands that are terms of a sum and stay terms."""

NAMED: dict[str, Rule] = {}
"""Rules for operators of libraries that may not be installed, by "namespace.name"."""

POINTWISE: list[Rule] = []
"""The rule for all operators that torch tags as pointwise."""


def rule(*operators: Any, linear: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule."""

    def enter(function: Rule) -> Rule:
        (LINEAR if linear else RULES).update(dict.fromkeys(operators, function))
        return function

    return enter


def rule_of(node: fx.Node, linear: bool = False) -> Rule | None:
    """Return the rule for a node's operator; None if there is none."""
    packet = getattr(node.target, "overloadpacket", node.target) if is_operator(node) else node.target
    found = (LINEAR if linear else RULES).get(packet) or (None if linear else NAMED.get(str(packet)))
    return POINTWISE[0] if found is None and not linear and is_pointwise(node) else found

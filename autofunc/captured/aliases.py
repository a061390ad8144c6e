"""Which arguments an operator of a captured graph shares memory with, and which it writes to."""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch import fx

Node = fx.Node


def aliased(node: Node) -> Node | None:
    """The argument whose memory a node's result may share."""
    if node.op != "call_function":
        return None
    if node.target is getitem:
        return aliased(node.args[0]) and node.args[0]  # type: ignore[arg-type,return-value]
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    returns = {name for each in node.target._schema.returns if each.alias_info for name in each.alias_info.before_set}
    for value, argument in _arguments(node):
        if argument.alias_info and argument.alias_info.before_set & returns:
            return value
    return None


def written(node: Node) -> list[Node]:
    """The arguments that an operator writes to."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    if node.target is torch.ops.aten.batch_norm.default:  # its schema does not say so
        running, training = node.args[3:5], node.args[5]
        return [each for each in running if isinstance(each, Node)] if training else []
    if node.target is torch.ops.aten.detach_.default:  # only its graph changes
        return []
    return [value for value, argument in _arguments(node) if argument.alias_info and argument.alias_info.is_write]


def _arguments(node: Node) -> list[tuple[Node, Any]]:
    """The values among an operator's arguments, each with what its schema says of it; also `out=`, and those in lists."""
    described = node.target._schema.arguments  # type: ignore[union-attr]
    named = {each.name: each for each in described}
    given = [*zip(node.args, described, strict=False), *((value, named[name]) for name, value in node.kwargs.items())]
    found: list[tuple[Node, Any]] = []
    for value, argument in given:
        parts = value if isinstance(value, (list, tuple)) else [value]
        found += [(part, argument) for part in parts if isinstance(part, Node)]
    return found

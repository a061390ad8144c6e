"""Drop operators that do nothing: detaches, first powers, views that change nothing or exist already, double transposes.

Autograd leaves many of them in a captured graph. In a small layer each costs about as much as an operator that computes.
"""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch import fx

from autofunc.graph.memory import is_view
from autofunc.graph.schema import arguments

Node = fx.Node

_aten = torch.ops.aten
_WAIT = torch.ops._c10d_functional.wait_tensor.default
_NORM_BACKWARD = _aten.native_batch_norm_backward.default
_RUNNING = (3, 4)  # positions of its running mean and variance
_RESHAPES = (_aten.view.default, _aten._unsafe_view.default)


def simplify(graph: fx.Graph) -> None:
    """Simplify a graph of functional operators in place; every remaining value keeps its bits."""
    views: dict[Any, Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        _drop_running_statistics(node)
        same = _same_as(node)
        if same is None and is_view(node) and node.target is not getitem:
            same = views.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
            same = None if same is node else same
        if same is not None:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    graph.lint()


def _same_as(node: Node) -> Node | None:
    """Return an earlier node with the same value, shape and strides, or None."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return None
    if node.target in (_aten.detach.default, _aten.alias.default):
        return source
    if node.target is _WAIT and source.target is _WAIT:
        return source
    if node.target is _aten.pow.Tensor_Scalar and node.args[1] == 1 and _layout(node) == _layout(source):
        return source  # from the gradient of a square: it would be kept besides the value itself
    if node.target in (*_RESHAPES, _aten.expand.default):
        if _layout(node) == _layout(source):
            return source
        if node.target in _RESHAPES and source.target in _RESHAPES:
            return _skipped(node, source)
    if node.target is _aten.t.default and source.target is _aten.t.default:
        return source.args[0]  # type: ignore[return-value]
    swaps = (node.target, source.target) == (_aten.transpose.int, _aten.transpose.int)
    if swaps and {dim % _rank(node) for dim in node.args[1:]} == {dim % _rank(node) for dim in source.args[1:]}:  # type: ignore[operator]
        return source.args[0]  # type: ignore[return-value]
    return None


def _drop_running_statistics(node: Node) -> None:
    """Drop running statistics from a batch norm's backward: in training it reads the batch's own."""
    if node.target is _NORM_BACKWARD and arguments(node)["train"]:
        for position in _RUNNING:
            node.update_arg(position, None)


def _skipped(node: Node, source: Node) -> Node | None:
    """Make a view of a view one of its source, if that is contiguous; return the source if it has the same layout."""
    first = source.args[0]
    if not isinstance(first, Node) or not first.meta["val"].is_contiguous():
        return None
    if _layout(node) == _layout(first):
        return first
    node.update_arg(0, first)
    return None


def _layout(node: Node) -> tuple[Any, ...]:
    value = node.meta["val"]
    return tuple(value.shape), tuple(value.stride()), value.dtype


def _rank(node: Node) -> int:
    return int(node.meta["val"].dim())

"""Restores `is_causal`, which has faster kernels, where a plain causal mask was built during capture.

Libraries skip the mask when they may ask for causal attention, but not under capture (transformers, `masking_utils.py`,
`_ignore_causal_mask_sdpa`). The mask depends on shapes alone, so it can be evaluated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from autofunc.captured.flow import Flow
from autofunc.captured.segment import Runtime
from autofunc.graph.last_use import last_uses
from autofunc.graph.reach import reachable
from autofunc.graph.schema import arguments

Node = fx.Node

_aten = torch.ops.aten
_ATTENTION = _aten.scaled_dot_product_attention.default
_POSITIONAL = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_BY_SHAPE_ALONE = (
    _aten.new_ones.default, _aten.new_zeros.default, _aten.new_full.default, _aten.new_empty.default,
    _aten.ones_like.default, _aten.zeros_like.default, _aten.full_like.default,
)  # fmt: skip
_MOST_ELEMENTS = 1 << 27  # of a mask; larger ones are not evaluated


def use_is_causal(flow: Flow, constant: Callable[[Node], Tensor | None]) -> bool:
    """Replace masks in place; return whether there were any.

    Args:
        flow: the captured forward.
        constant: returns real values of buffers and constants, on the CPU; None for other nodes.
    """
    found = False
    known: dict[Node, Any] = {}
    for node in flow.nodes:
        if node.target is not _ATTENTION:
            continue
        given = arguments(node)
        mask = given["attn_mask"]
        if not isinstance(mask, Node) or mask in flow.weighted or flow.writes_to(mask):
            continue
        if mask not in known:
            with torch.device("cpu"):  # not the caller's default
                known[mask] = _is_causal(mask, given["query"], given["key"], flow, constant)
        if known[mask]:
            given |= {"attn_mask": None, "is_causal": True}
            node.args = tuple(given[name] for name in _POSITIONAL)
            node.kwargs = {name: value for name, value in node.kwargs.items() if name not in _POSITIONAL}
            found = True
    return found


def _is_causal(mask: Node, query: Node, key: Node, flow: Flow, constant: Callable[[Node], Tensor | None]) -> bool:
    queries, keys = (node.meta["val"].shape[-2] for node in (query, key))
    shape = mask.meta["val"].shape
    if queries != keys or tuple(shape[-2:]) != (queries, keys) or shape.numel() > _MOST_ELEMENTS:
        return False
    value = _evaluate(mask, flow, constant)
    if value is None:
        return False
    causal = torch.ones(value.shape[-2:], dtype=torch.bool).tril()
    if value.dtype == torch.bool:
        return bool((value == causal).all())
    hidden = value <= torch.finfo(value.dtype).min / 2
    return bool(((value == 0) == causal).all() and (hidden == ~causal).all())


def _evaluate(root: Node, flow: Flow, constant: Callable[[Node], Tensor | None]) -> Tensor | None:
    """Return a value that depends on shapes and constants alone; None if it depends on the batch."""
    needed = _needed(root, flow)
    values: dict[Node, Any] = {}
    nodes = [node for node in flow.exported.graph.nodes if node in needed]
    for node, done in zip(nodes, last_uses([(node, node.all_input_nodes) for node in nodes], {root}), strict=True):
        if node.op == "placeholder":
            value = constant(node)
            if value is None:
                return None
            values[node] = value
            continue
        args, kwargs = fx.node.map_aggregate(
            (node.args, dict(node.kwargs)), lambda leaf: torch.device("cpu") if leaf == Runtime("device") else leaf
        )
        if node.target in _BY_SHAPE_ALONE:
            like = args[0].meta["val"]
            args = (torch.empty(like.shape, dtype=like.dtype), *args[1:])
        args, kwargs = fx.node.map_arg((args, kwargs), values.__getitem__)
        values[node] = node.target(*args, **{**kwargs, **({"device": "cpu"} if "device" in kwargs else {})})
        for each in done:
            values.pop(each, None)  # absent if only its shape was needed
    result: Tensor = values[root]
    return result


def _needed(root: Node, flow: Flow) -> set[Node]:
    """Return the nodes that must be computed for a value."""

    def needs(node: Node) -> list[Node]:
        needed = flow.needs(node) if node.op == "call_function" else []
        return needed[1:] if node.target in _BY_SHAPE_ALONE else needed

    return reachable([root], needs)

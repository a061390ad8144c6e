"""A plain causal mask that was built while capturing goes back to being `is_causal`, which has faster kernels.

Libraries skip the mask when they may ask for causal attention, but not under capture (transformers, `masking_utils.py`,
`_ignore_causal_mask_sdpa`). The mask depends on shapes alone, so it can be looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from autofunc.captured.flow import Flow
from autofunc.captured.segment import Runtime

Node = fx.Node

_aten = torch.ops.aten
_ATTENTION = _aten.scaled_dot_product_attention.default
_BY_SHAPE_ALONE = (
    _aten.new_ones.default, _aten.new_zeros.default, _aten.new_full.default, _aten.new_empty.default,
    _aten.ones_like.default, _aten.zeros_like.default, _aten.full_like.default,
)  # fmt: skip
_MOST_ELEMENTS = 1 << 27  # of a mask that is looked at


def use_is_causal(flow: Flow, constant: Callable[[Node], Tensor | None]) -> bool:
    """Replace masks in place; returns whether there was one.

    Args:
        flow: of the captured forward.
        constant: real values of buffers and constants; None where they are not known.
    """
    found = False
    known: dict[Node, Any] = {}
    for node in flow.nodes:
        if node.target is not _ATTENTION:
            continue
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        if not isinstance(mask, Node) or mask in flow.weighted or flow.writes_to(mask):
            continue
        if mask not in known:
            known[mask] = _is_causal(mask, node, flow, constant)
        if known[mask]:
            query, key, value, *rest = node.args
            defaults = [None, 0.0, False]
            rest = [*rest, *defaults[len(rest) :]]
            node.args = (query, key, value, None, rest[1], True, *rest[3:])
            node.kwargs = {name: value for name, value in node.kwargs.items() if name not in ("attn_mask", "is_causal")}
            found = True
    return found


def _is_causal(mask: Node, attention: Node, flow: Flow, constant: Callable[[Node], Tensor | None]) -> bool:
    query, key = (attention.args[index].meta["val"] for index in (0, 1))  # type: ignore[union-attr]
    shape = mask.meta["val"].shape
    if (
        query.shape[-2] != key.shape[-2]
        or tuple(shape[-2:]) != (query.shape[-2], key.shape[-2])
        or shape.numel() > _MOST_ELEMENTS
    ):
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
    """A value that depends on shapes and constants alone; None when it depends on the batch."""
    needed = _needed(root, flow)
    values: dict[Node, Any] = {}
    for node in flow.exported.graph.nodes:
        if node not in needed:
            continue
        if node.op == "placeholder":
            value = constant(node)
            if value is None:
                return None
            values[node] = value
            continue
        args, kwargs = fx.node.map_aggregate(
            (node.args, dict(node.kwargs)), lambda leaf: torch.device("cpu") if leaf == Runtime("device") else leaf
        )
        if isinstance(node.target, torch._ops.OpOverload) and node.target in _BY_SHAPE_ALONE:
            like = args[0].meta["val"]
            args = (torch.empty(like.shape, dtype=like.dtype), *args[1:])
        args, kwargs = fx.node.map_arg((args, kwargs), values.__getitem__)
        values[node] = node.target(*args, **{**kwargs, **({"device": "cpu"} if "device" in kwargs else {})})
        for argument in node.all_input_nodes:
            if all(user in values or user not in needed for user in argument.users):
                values.pop(argument, None)
    result: Tensor = values[root]
    return result


def _needed(root: Node, flow: Flow) -> set[Node]:
    found: set[Node] = set()
    left = [root]
    while left:
        node = left.pop()
        if node in found:
            continue
        found.add(node)
        needs = flow.needs(node) if node.op == "call_function" else []
        if isinstance(node.target, torch._ops.OpOverload) and node.target in _BY_SHAPE_ALONE:
            needs = needs[1:]
        left += needs
    return found

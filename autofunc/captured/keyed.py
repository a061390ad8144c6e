"""Dropout of a captured module becomes a function of the key, the same in every layout; other randomness is refused."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx

from autofunc import random
from autofunc.captured.segment import Runtime
from autofunc.errors import ModelError
from autofunc.fingerprint import Name
from autofunc.graph.lines import line_of
from autofunc.graph.memory import aliased
from autofunc.graph.schema import arguments, is_mutable, is_random

_aten = torch.ops.aten
_DROPOUT = (_aten.dropout.default, _aten.dropout_.default)
_FEATURES = (_aten.feature_dropout.default, _aten.feature_dropout_.default)
_ATTENTION = _aten.scaled_dot_product_attention.default


def dropout(x: Tensor, p: float, key: Tensor | None, name: str) -> Tensor:
    """See `af.random.dropout`."""
    return random.dropout(x, p, {"key": key}, name)


def feature_dropout(x: Tensor, p: float, key: Tensor | None, name: str) -> Tensor:
    """Drops whole channels: one draw for each of the first two dims."""
    if key is None:
        return x
    ones = torch.ones(*x.shape[:2], *[1] * (x.dim() - 2), dtype=x.dtype, device=x.device)
    return x * random.dropout(ones, p, {"key": key}, name)


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float, is_causal: bool, scale: float | None,
    enable_gqa: bool, random_key: Tensor | None, name: str,
) -> Tensor:  # fmt: skip
    """Attention with dropout of its weights; without a key it is `scaled_dot_product_attention` itself."""
    if random_key is None:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        group = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(group, -3), value.repeat_interleave(group, -3)
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return random.dropout(scores.softmax(-1), p, {"key": random_key}, name) @ value


def replace_random(graph: fx.Graph, what: str) -> None:
    """Change a graph in place.

    Raises:
        ModelError: for randomness other than dropout.
    """
    count: Counter[str] = Counter()
    for node in list(graph.nodes):
        if node.target in (*_DROPOUT, *_FEATURES):
            x, p, _ = arguments(node).values()
            if not is_random(node):
                _replace(graph, node, x)
                continue
            function: Any = dropout if node.target in _DROPOUT else feature_dropout
            args: tuple[Any, ...] = (x, p)
        elif not is_random(node):
            continue
        elif node.target is _ATTENTION:
            function, args = attention, tuple(arguments(node).values())
        else:
            raise ModelError(
                f"{what} draws from the global random generator ({node.target}; {line_of(node)}), which would differ from "
                "layout to layout; use dropout, which becomes a function of the key, or af.random"
            )
        place = node.meta["modules"][-1][0] if node.meta["modules"] else ""
        label = _label(place)
        name = f"{label}#{count[label]}" if count[label] else label
        count[label] += 1
        with graph.inserting_before(node):
            new = graph.call_function(function, (*args, Runtime("key"), Name(name)))  # type: ignore[arg-type]
        new.meta.update(node.meta)
        _replace(graph, node, new)


def _label(place: str) -> str:
    """The module's name, with the number of the call where there are several: `L__self__module.h.0.drop@1`."""
    return place.partition("module.")[2] or place


def _replace(graph: fx.Graph, node: fx.Node, value: Any) -> None:
    """Later users of what was dropped in place see the result, too."""
    if is_mutable(node) and value is not node.args[0]:
        target: Any = node.args[0]
        if aliased(target) is not None or any(aliased(user) is target for user in target.users if user is not node):
            with graph.inserting_before(node):  # whatever shares its memory sees it too
                copied = graph.call_function(_aten.copy_.default, (target, value))
            copied.meta.update(node.meta)
            value = copied
        else:
            order = {each: position for position, each in enumerate(graph.nodes)}
            target.replace_all_uses_with(value, lambda user: order.get(user, 0) > order[node])
    node.replace_all_uses_with(value)
    graph.erase_node(node)

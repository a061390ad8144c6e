"""Randomness of a captured module as functions of the key, the same in every layout.

Without a key, dropout and its variants are off; a draw is an error.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from autofunc import random
from autofunc.captured.autograd_functions import operators_of
from autofunc.captured.draws import draw, options_of
from autofunc.captured.recurrent import RECURRENT, layer_by_layer, recurrent_arguments
from autofunc.captured.segment import Runtime
from autofunc.errors import ModelError
from autofunc.fingerprint import Name
from autofunc.graph.lines import line_of
from autofunc.graph.memory import aliased, written
from autofunc.graph.schema import arguments, is_operator, is_random, name_of

_aten = torch.ops.aten
_ALPHA = 1.7580993408473766  # alpha dropout sets elements to -1 times this, the left limit of SELU


def dropout(x: Tensor, p: float, key: Tensor | None, name: str) -> Tensor:
    """See `af.random.dropout`; like torch's, it also takes p = 1."""
    return x * 0.0 if p == 1.0 and key is not None else random.dropout(x, p, {"key": key}, name)


def feature_dropout(x: Tensor, p: float, key: Tensor | None, name: str) -> Tensor:
    """Drop whole channels: one draw for each index of the first two dims."""
    return x if key is None else torch.mul(x, dropout(_ones_of_features(x), p, key, name))


def alpha_dropout(x: Tensor, p: float, key: Tensor | None, name: str) -> Tensor:
    """Dropout that keeps the mean and variance of SELU's outputs."""
    return x if key is None else _alpha_dropped(x, torch.ones_like(x), p, key, name)


def feature_alpha_dropout(x: Tensor, p: float, key: Tensor | None, name: str) -> Tensor:
    """Alpha dropout of whole channels."""
    return x if key is None else _alpha_dropped(x, _ones_of_features(x), p, key, name)


def _ones_of_features(x: Tensor) -> Tensor:
    return torch.ones(*x.shape[:2], *[1] * (x.dim() - 2), dtype=x.dtype, device=x.device)


def _alpha_dropped(x: Tensor, ones: Tensor, p: float, key: Tensor, name: str) -> Tensor:
    if p == 1.0:
        return x * 0.0
    kept = random.bernoulli(random.fold_in(key, name), 1.0 - p, ones.shape).to(x.dtype)
    scale = ((1.0 - p) * (1.0 + p * _ALPHA**2)) ** -0.5
    return torch.add(x * (kept * scale), ((kept - 1.0) * _ALPHA + _ALPHA * p) * scale)


def rrelu(x: Tensor, lower: float, upper: float, key: Tensor | None, name: str) -> Tensor:
    """Randomised leaky ReLU: one slope drawn per negative element; the mean slope without a key."""
    if key is None:
        return torch.nn.functional.leaky_relu(x, (lower + upper) / 2)
    slope = random.uniform(random.fold_in(key, name), x.shape, x.dtype, low=lower, high=upper)
    return torch.where(x <= 0, x * slope, x)


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float, is_causal: bool, scale: float | None,
    enable_gqa: bool, random_key: Tensor | None, name: str,
) -> Tensor:  # fmt: skip
    """Attention with dropout on its weights; without a key, `scaled_dot_product_attention` itself."""
    if random_key is None:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        key, value = for_each_head(key, query), for_each_head(value, query)
    return random.dropout(attention_weights(query, key, mask, is_causal, scale), p, {"key": random_key}, name) @ value


def attention_weights(
    query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:  # fmt: skip
    """Return the weights of attention, (..., queries, keys)."""
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)


def for_each_head(x: Tensor, query: Tensor) -> Tensor:
    """Repeat keys or values so that each of the queries' heads has its own."""
    return x.repeat_interleave(query.shape[-3] // x.shape[-3], -3)


_DROPOUTS: dict[str, Callable[..., Tensor]] = {
    "dropout": dropout, "feature_dropout": feature_dropout, "alpha_dropout": alpha_dropout,
    "feature_alpha_dropout": feature_alpha_dropout, "rrelu": rrelu,
}  # fmt: skip


def replace_random(graph: fx.Graph, what: str) -> None:
    """Replace random operators in a graph, in place, by functions of (key, name).

    Raises:
        ModelError: for a random operator without such a function.
    """
    count: Counter[str] = Counter()
    for node in list(graph.nodes):
        kind = kind_of(node)
        _refuse_draws_inside(node, what)
        if not is_random(node):
            if kind.endswith("dropout"):
                _replace(graph, node, arguments(node)["input"])
            continue
        if kind in _DROPOUTS:
            function: Any = _DROPOUTS[kind]
            args = tuple(value for name, value in arguments(node).items() if name not in ("train", "training", "generator"))
        elif kind in RECURRENT:
            function, args = layer_by_layer, (kind, *recurrent_arguments(node))
        elif kind == "scaled_dot_product_attention":
            function, args = attention, tuple(arguments(node).values())
        elif (options := options_of(kind, node, what)) is not None:
            value, where = node.meta["val"], f"{what} draws random numbers ({node.target}; {line_of(node)})"
            function, args = draw, (kind, list(value.shape), value.dtype, options, where)
        else:
            raise ModelError(
                f"{what} draws from the global random generator ({node.target}; {line_of(node)}), which would depend on "
                "the layout; draw with torch.rand, randn or exponential_, which become functions of the key, or pass the "
                "draws in the batch"
            )
        place = node.meta["modules"][-1][0] if node.meta["modules"] else ""
        label = _label(place)
        name = f"{label}#{count[label]}" if count[label] else label
        count[label] += 1
        with graph.inserting_before(node):
            new = graph.call_function(function, (*args, Runtime("key"), Name(name)))  # type: ignore[arg-type]
        new.meta.update(node.meta)
        _replace(graph, node, new)


def _refuse_draws_inside(node: fx.Node, what: str) -> None:
    drawn = next(filter(is_random, operators_of(node)), None)
    if drawn is not None:
        raise ModelError(
            f"{what}: the forward of an autograd.Function draws random numbers ({drawn.target}; {line_of(node)}); draw "
            "them before, and pass them to its apply"
        )


def kind_of(node: fx.Node) -> str:
    """Return the name of a node's operator, without "aten.", its overload, and an in-place operator's underscore."""
    return name_of(node).removesuffix("_") if is_operator(node) else ""


def _label(place: str) -> str:
    """Return the module's name, with the number of the call if there are several: `L__self__module.h.0.drop@1`."""
    return place.partition("module.")[2] or place


def _replace(graph: fx.Graph, node: fx.Node, value: Any) -> None:
    """Replace a node, so that later users of a tensor drawn or dropped in place see the result too."""
    targets = written(node)
    if targets and value is not targets[0]:
        target = targets[0]
        shared = aliased(target) is not None or any(aliased(user) is target for user in target.users if user is not node)
        kept = target.op == "placeholder" and value.target is draw  # the module's tensor; the next forward would read it
        if shared or kept:  # everything that shares the memory sees it too
            with graph.inserting_before(node):
                copied = graph.call_function(_aten.copy_.default, (target, value))
            copied.meta.update(node.meta)
            value = copied
        else:
            order = {each: position for position, each in enumerate(graph.nodes)}
            target.replace_all_uses_with(value, lambda user: order.get(user, 0) > order[node])
    node.replace_all_uses_with(value)
    graph.erase_node(node)

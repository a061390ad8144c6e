"""Rules for randomness over the ranks of an axis: each rank draws for the whole, and takes its part."""

from __future__ import annotations

import torch
from torch import Tensor

from autofunc.captured.keyed import attention, attention_weights, dropout, for_each_head
from autofunc.spreading import Cut, Operation, Outcome, Want, rule
from autofunc.spreading.movements import piece_of_shared
from autofunc.spreading.operation import shape_of
from autofunc.spreading.rules.attention import heads_of


@rule(dropout)
def cut_dropout(op: Operation) -> Outcome | None:
    """Dropout of a cut value."""
    x, p, key, name = op.node.args
    cut = op.cut(x)
    if cut is None:
        return None
    place = (list(op.shape), cut.dim, cut.parts, op.axis)
    return Outcome(cut, dropout_of_part, (Want(x, cut), p, key, name, *place))  # type: ignore[arg-type]


def dropout_of_part(
    x: Tensor, p: float, key: Tensor | None, name: str, shape: list[int], dim: int, parts: tuple[int, ...], axis: str
) -> Tensor:
    """Apply dropout to a part of a value with this shape, as it would be applied to the whole."""
    if key is None or p == 0.0:
        return x
    return x * piece_of_shared(dropout(torch.ones(shape, dtype=x.dtype, device=x.device), p, key, name), axis, dim, parts)


@rule(attention)
def cut_attention(op: Operation) -> Outcome | None:
    """Attention with dropout on its weights, cut by heads or by rows."""
    q, k, v, mask, p, is_causal, scale, grouped, key, name = op.node.args
    found = heads_of(op, q, k, v, mask, grouped=bool(grouped))  # type: ignore[arg-type]
    if found is None:
        return None
    cut, keys, values, masks = found
    shape = [*op.shape[:-1], shape_of(k)[-2]]
    place = (shape, cut.dim, cut.parts, op.axis)
    args = (Want(q, cut), keys, values, masks, p, is_causal, scale, grouped, key, name, *place)  # type: ignore[arg-type]
    return Outcome(Cut(cut.dim, cut.parts), attention_of_part, args)


def attention_of_part(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float, is_causal: bool, scale: float | None,
    enable_gqa: bool, random_key: Tensor | None, name: str, shape: list[int], dim: int, parts: tuple[int, ...], axis: str,
) -> Tensor:  # fmt: skip
    """Compute attention for some of the heads or rows; `shape` is that of the weights of all."""
    if random_key is None:
        return attention(query, key, value, mask, p, is_causal, scale, enable_gqa, None, name)
    if enable_gqa:
        key, value = for_each_head(key, query), for_each_head(value, query)
    weights = attention_weights(query, key, mask, is_causal, scale)
    return dropout_of_part(weights, p, random_key, name, shape, dim, parts, axis) @ value

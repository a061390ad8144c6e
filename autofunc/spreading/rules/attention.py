"""Attention, cut by heads or by rows."""

from __future__ import annotations

import torch
from torch import Tensor

from autofunc.spreading.layouts import FULL, Cut
from autofunc.spreading.movements import piece_of_shared
from autofunc.spreading.operation import Node, Operation, Outcome, Want, shape_of
from autofunc.spreading.rules.table import rule

_aten = torch.ops.aten


@rule(_aten.scaled_dot_product_attention)
def attention(op: Operation) -> Outcome | None:
    """`softmax(query @ key.T + mask) @ value` of (rows, heads, tokens, features)."""
    q, k, v, mask = (op.given[name] for name in ("query", "key", "value", "attn_mask"))
    grouped = bool(op.given["enable_gqa"])
    if grouped and _are_few(op, q, k, v):
        cut = Cut(len(op.shape) - 3, (shape_of(q)[-3],))
        options = (op.given["dropout_p"], op.given["is_causal"], op.given["scale"])
        return Outcome(cut, attention_of_few, (Want(q, cut), k, v, _mask_of(op, mask, cut), *options, cut.parts, op.axis))
    found = heads_of(op, q, k, v, mask, grouped=grouped)
    if found is None:
        return None
    cut, keys, values, masks = found
    return op.becomes(cut, query=Want(q, cut), key=keys, value=values, attn_mask=masks)


def heads_of(
    op: Operation, q: Node, k: Node, v: Node, mask: Node | None, *, grouped: bool
) -> tuple[Cut, Want, Want, Want | None] | None:
    """Return the cut of attention, then keys, values and mask in their layouts; None if it cannot be cut."""
    cut = next((cut for each in (q, k, v) if (cut := op.cut(each)) is not None), None)
    if cut is None or cut.dim >= len(op.shape) - 2 or cut.dim not in (0, len(op.shape) - 3):
        return None
    by_heads = cut.dim == len(op.shape) - 3
    heads, of_keys = shape_of(q)[cut.dim], shape_of(k)[cut.dim]
    if by_heads and grouped:
        if len(cut.parts) != 1 or heads % op.size or of_keys % op.size:
            return None
        both = Cut(cut.dim, (heads,)), Cut(cut.dim, (of_keys,))
    else:
        both = cut, cut
        if heads != cut.whole or of_keys != cut.whole:
            return None
    return both[0], Want(k, both[1]), Want(v, both[1]), _mask_of(op, mask, both[0])


def _mask_of(op: Operation, mask: Node | None, cut: Cut) -> Want | None:
    if mask is None:
        return None
    shape, dim = shape_of(mask), cut.dim - len(op.shape) + len(shape_of(mask))
    return Want(mask, cut.at(dim) if dim >= 0 and shape[dim] == cut.whole else FULL)


def _are_few(op: Operation, q: Node, k: Node, v: Node) -> bool:
    """True if queries are cut by heads, and every rank has all keys because ranks do not divide their heads."""
    cut = op.cut(q)
    few = shape_of(k)[-3] % op.size != 0 and op.layout(k) is op.layout(v) is FULL
    return few and cut is not None and cut == Cut(len(op.shape) - 3, (shape_of(q)[-3],)) and cut.fits(op.size)


def attention_of_few(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float, is_causal: bool, scale: float | None,
    heads: tuple[int, ...], axis: str,
) -> Tensor:  # fmt: skip
    """Attend with this rank's query heads to the key heads they belong to, out of all key heads."""
    times = sum(heads) // key.shape[-3]
    key, value = (piece_of_shared(x.repeat_interleave(times, -3), axis, x.dim() - 3, heads) for x in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, p, is_causal, scale=scale)

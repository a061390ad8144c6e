"""Attention of some queries to a block of keys, and the merging of blocks by their log-sum-exp.

Shapes: B rows, N heads, K key and value heads (K divides N), T queries, S keys, H features of a head.

Sources: Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867; Dao, "FlashAttention-2",
arXiv 2307.08691, section 3.1 (the backward of a block from the whole's output and log-sum-exp).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

_aten = torch.ops.aten


class Gradients(NamedTuple):
    """A block's contributions to the gradients of its queries, keys, values and, if wanted, its mask."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None


def exact(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums over blocks accumulate: fp32 at least."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask as the term added to scores: -inf at hidden keys.

    The dtype's lowest number, with which some libraries hide keys, counts as -inf; otherwise the log-sum-exp could not tell
    a block of hidden keys from a visible one. This matters for queries that see nothing at all: they get zeros.
    """
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
    return mask.to(dtype).masked_fill(mask <= torch.finfo(mask.dtype).min / 2, float("-inf"))


def block(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_diagonal: bool, scale: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend to a block of keys; return the output (B, N, T, H) and the log-sum-exp of the scores (B, N, T).

    Args:
        query: (B, N, T, H).
        key: (B, K, S, H).
        value: (B, K, S, H).
        mask: additive, see `additive`; broadcasts to (B, N, T, S).
        is_diagonal: queries and keys are the same tokens, and each sees itself and those before it.
        scale: factor of the scores.
    """
    if _has_flash(query, value):
        if mask is not None:
            mask = mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        output, total = _aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_diagonal, attn_mask=mask, scale=scale
        )
        return output, _none_seen(total, mask)
    key, value = _for_each_head(key, value, query.shape[1])
    scores = _scores(query, key, mask, is_diagonal, scale)
    total = scores.logsumexp(-1)
    weights = (scores - _finite(total).unsqueeze(-1)).exp_()
    return (weights.to(value.dtype) @ value), total


def block_backward(
    cotangent: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, output: Tensor, total: Tensor,
    is_diagonal: bool, scale: float, *, of_mask: bool,
) -> Gradients:  # fmt: skip
    """Compute a block's contributions to the gradients, in the kernel's precision.

    Args:
        cotangent: of `output`, (B, N, T, H).
        query: as for `block`, like the next three.
        key: as for `block`.
        value: as for `block`.
        mask: as for `block`.
        output: of attention to all keys, (B, N, T, H).
        total: the log-sum-exp over all keys, (B, N, T).
        is_diagonal: as for `block`.
        scale: as for `block`.
        of_mask: whether to compute the mask's gradient.
    """
    groups, total = key.shape[1], _finite(total)
    if _has_flash(query, value) and not of_mask:
        if mask is not None:
            mask = mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        key, value = _for_each_head(key, value, query.shape[1])
        by_query, by_key, by_value = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            cotangent, query, key, value, output, total, 0.0, is_diagonal, attn_mask=mask, scale=scale
        )
        return Gradients(by_query, _of_groups(by_key, groups), _of_groups(by_value, groups), None)
    key, value = _for_each_head(key, value, query.shape[1])
    weights = (_scores(query, key, mask, is_diagonal, scale) - total.unsqueeze(-1)).exp_()
    of_scores = (cotangent @ value.transpose(-2, -1)).to(weights.dtype)
    of_scores -= (cotangent * output).sum(-1, keepdim=True, dtype=weights.dtype)
    of_scores *= weights
    by_value = weights.to(cotangent.dtype).transpose(-2, -1) @ cotangent
    given = of_scores.to(query.dtype)
    by_query, by_key = given @ key * scale, given.transpose(-2, -1) @ query * scale
    by_mask = of_scores if of_mask else None
    return Gradients(by_query, _of_groups(by_key, groups), _of_groups(by_value, groups), by_mask)


def merge(output: Tensor, total: Tensor, more: Tensor, more_total: Tensor) -> None:
    """Merge attention to more keys into the result so far, in place.

    Args:
        output: for the keys so far, (B, N, T, H).
        total: their log-sum-exp, (B, N, T); -inf where no key was visible.
        more: the output for the other keys, of the same shape.
        more_total: their log-sum-exp.
    """
    both = torch.logaddexp(total, more_total.to(total.dtype))
    shift = _finite(both)
    output.mul_((total - shift).exp_().unsqueeze(-1))
    output.add_(more * (more_total - shift).exp_().unsqueeze(-1))
    total.copy_(both)


def _has_flash(query: Tensor, value: Tensor) -> bool:
    """True if a kernel that keeps no scores takes these; otherwise scores are written out, one block at a time."""
    return query.device.type == "cpu" and query.shape[-1] == value.shape[-1]


def _none_seen(total: Tensor, mask: Tensor | None) -> Tensor:
    """Put -inf for queries that see none of the keys, where the kernel returns 0."""
    if mask is None:
        return total
    return total.masked_fill((mask == float("-inf")).all(-1), float("-inf"))


def _finite(total: Tensor) -> Tensor:
    """Return what is subtracted from scores: finite even for queries that see nothing, where any number does."""
    return total.masked_fill(total == float("-inf"), 0.0)


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, is_diagonal: bool, scale: float) -> Tensor:
    scores = (query @ key.transpose(-2, -1)).to(exact(query.dtype)) * scale
    if is_diagonal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores if mask is None else scores + mask


def _for_each_head(key: Tensor, value: Tensor, heads: int) -> Any:
    group = heads // key.shape[1]
    return (key, value) if group == 1 else (key.repeat_interleave(group, 1), value.repeat_interleave(group, 1))


def _of_groups(gradient: Tensor, groups: int) -> Tensor:
    """Sum the gradients of query heads into those of key heads."""
    rows, heads, tokens, features = gradient.shape
    return gradient if heads == groups else gradient.reshape(rows, groups, heads // groups, tokens, features).sum(2)

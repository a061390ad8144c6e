"""Embeddings and losses over a cut vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from autofunc.spreading.axis import axis_named
from autofunc.spreading.entropy import cross_entropy_along
from autofunc.spreading.layouts import FULL, TERMS
from autofunc.spreading.operation import Operation, Outcome, Want, shape_of
from autofunc.spreading.rules.table import rule

_aten = torch.ops.aten


@rule(_aten.embedding)
def embedding(op: Operation) -> Outcome | None:
    """Look up rows of a weight: each rank has some of the rows, or a part of each."""
    weight, ids = op.given["weight"], op.given["indices"]
    own, given = op.cut(weight), op.cut(ids)
    if own is not None and op.given["scale_grad_by_freq"]:
        return None
    if own is not None and own.dim == 0 and len(own.parts) == 1:
        return Outcome(TERMS, embedding_term, (Want(weight, own), Want(ids, FULL), op.given["padding_idx"], op.axis))
    if own is not None:
        return op.becomes(own.at(len(op.shape) - 1), weight=Want(weight, own)) if own.dim == 1 else None
    return None if given is None else op.becomes(given, indices=Want(ids, given))


def embedding_term(weight: Tensor, ids: Tensor, padding: int, axis: str) -> Tensor:
    """Look up the rows that this rank has; others are zeros. The row of `padding` gets no gradient; -1 means none.

    Source: Shoeybi et al., "Megatron-LM", arXiv 1909.08053, section 3.
    """
    first = axis_named(axis).rank * weight.shape[0]
    own = ids - first
    mine = (own >= 0) & (own < weight.shape[0])
    unlearnt = padding - first if 0 <= padding - first < weight.shape[0] and padding >= 0 else None
    rows = torch.nn.functional.embedding(torch.where(mine, own, 0), weight, unlearnt)
    return rows * mine.unsqueeze(-1).to(rows.dtype)


@rule(_aten.cross_entropy_loss)
def cross_entropy(op: Operation) -> Outcome | None:
    """Of logits (tokens, vocabulary), cut along the vocabulary, and labels."""
    logits, labels = op.given["self"], op.given["target"]
    cut, reduction = op.cut(logits), op.given["reduction"]
    if cut is None or cut.dim != 1 or len(cut.parts) != 1 or len(shape_of(logits)) != 2:
        return None
    if op.given["weight"] is not None or op.given["label_smoothing"] or reduction not in (1, 2):
        return None
    if labels.meta["val"].dtype.is_floating_point:
        return None
    ignored = op.given["ignore_index"]
    return Outcome(FULL, cross_entropy_of_parts, (Want(logits, cut), Want(labels, FULL), reduction == 1, ignored, op.axis))


def cross_entropy_of_parts(logits: Tensor, labels: Tensor, mean: bool, ignored: int, axis: str) -> Tensor:
    """Return the cross-entropy in nats, the mean over labels that count or the sum; the same on every rank."""
    exact = logits if logits.dtype.itemsize >= 4 else logits.float()
    total = cross_entropy_along(exact, labels, axis, ignored)
    return (total / (labels != ignored).sum() if mean else total).to(logits.dtype)

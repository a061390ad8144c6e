"""Rules for operators with cut tokens, where they differ from the rules for tensor parallel ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from autofunc.context_parallel.attention import context_attention
from autofunc.context_parallel.axis import ContextAxis
from autofunc.context_parallel.moves import all_tokens, on_first, one_token
from autofunc.spreading import FULL, TERMS, Cut, Operation, Outcome, Want
from autofunc.spreading.operation import Borders, Node, Undivided, shape_of
from autofunc.spreading.rules import rule_of

Rule = Callable[[Operation, ContextAxis], "Outcome | None"]

_aten = torch.ops.aten

RULES: dict[Any, Rule] = {}
"""By operator (all overloads) or its name: these come before the rules of `spreading` ..."""

LINEAR: dict[Any, Rule] = {}
"""... and these where operands are terms of a sum that stay terms."""

PRODUCTS = {_aten.matmul, _aten.bmm, _aten.baddbmm, _aten.mm, _aten.addmm}
"""Products one operand of which may be gathered: that is attention written out."""


def rule(*operators: Any, linear: bool = False) -> Callable[[Rule], Rule]:
    """Register a function as the rule for some operators."""

    def enter(function: Rule) -> Rule:
        (LINEAR if linear else RULES).update(dict.fromkeys(operators, function))
        return function

    return enter


def by_rule(node: Node, seen: Mapping[Node, Any], axis: ContextAxis, *, linear: bool = False) -> Outcome | None:
    """Return what becomes of an operator by its rule, here or in `spreading`; None if no rule applies.

    Args:
        node: of the whole graph.
        seen: layouts of its operands.
        axis: the ranks.
        linear: whether some operands are terms of a sum, and are to stay terms.
    """
    table = LINEAR if linear else RULES
    packet = getattr(node.target, "overloadpacket", node.target)
    own, other = table.get(packet) or table.get(str(packet)), rule_of(node, linear=linear)
    operation = Operation(node, seen, axis.size, axis.ranks)
    try:
        if own is not None:
            return own(operation, axis)
        return other(operation) if other is not None else None
    except (Borders, Undivided):
        return None


@rule(_aten.scaled_dot_product_attention)
def attention(op: Operation, axis: ContextAxis) -> Outcome | None:
    """Cut queries attend to keys and values that are cut too, or that all ranks have."""
    q, k, v, mask = (op.given[name] for name in ("query", "key", "value", "attn_mask"))
    cut, dims = op.cut(q), len(op.shape)
    if cut is None or cut.dim != dims - 2 or op.given["dropout_p"]:
        return None
    masked = Want(mask, rows_of(mask, cut)) if mask is not None else None
    of_keys = [op.cut(each) for each in (k, v)]
    if of_keys == [None, None] and not op.given["is_causal"]:
        return op.becomes(cut, query=Want(q, cut), key=Want(k, FULL), value=Want(v, FULL), attn_mask=masked)
    tokens = shape_of(k)[-2]
    keys = cut if op.given["is_causal"] else Cut(dims - 2, (tokens,))
    if op.given["is_causal"] and tokens != cut.whole:
        return None
    options = {"is_causal": op.given["is_causal"], "scale": op.given["scale"], "ranks": axis.ranks, "method": axis.method}
    return Outcome(cut, context_attention, (Want(q, cut), Want(k, keys), Want(v, keys), masked), options)


def rows_of(mask: Any, cut: Cut) -> Any:
    """Return the layout of a mask (..., queries, keys) whose queries are cut."""
    shape = shape_of(mask)
    return Cut(len(shape) - 2, cut.parts) if len(shape) > 1 and shape[-2] == cut.whole and cut.whole > 1 else FULL


@rule(_aten.matmul, _aten.bmm, _aten.mm)
def product(op: Operation, axis: ContextAxis) -> Outcome | None:
    """Rows of the left operand with all of the right: scores, or values weighted by them."""
    left, right = list(op.given.values())[:2]
    cut = op.cut(left)
    rows = cut is not None and cut.dim == len(shape_of(left)) - 2 and op.cut(right) is not None
    found = rule_of(op.node)
    assert found is not None
    seen = {left: op.layout(left), right: FULL if rows and _mixes(op, right) else op.layout(right)}
    return found(Operation(op.node, seen, op.size, op.axis))


def _mixes(op: Operation, right: Any) -> bool:
    """True if tokens are in the last two dims of the right operand; in others, rows of both are the same tokens."""
    cut = op.cut(right)
    return cut is not None and cut.dim >= len(shape_of(right)) - 2


@rule(_aten.baddbmm)
def biased_product(op: Operation, axis: ContextAxis) -> Outcome | None:
    """Like `product`, plus a bias."""
    bias, left, right = (op.given[name] for name in ("self", "batch1", "batch2"))
    cut = op.cut(left)
    if cut is None or cut.dim != 1:
        return rule_of(op.node)(op)  # type: ignore[misc]
    added = Want(bias, rows_of(bias, cut))
    return op.becomes(cut, self=added, batch1=Want(left, cut), batch2=Want(right, FULL))


@rule(_aten.select)
def select(op: Operation, axis: ContextAxis) -> Outcome | None:
    """One token that stands for the sequence, such as the first: a term of a sum, on the rank that has it."""
    x, shape = op.given["self"], shape_of(op.given["self"])
    cut, dim = op.cut(x), op.given["dim"] % len(shape)
    if cut is None or dim != cut.dim:
        return rule_of(op.node)(op)  # type: ignore[misc]
    if len(cut.parts) != 1 or not isinstance(op.given["index"], int):
        return None
    return Outcome(TERMS, one_token, (Want(x, cut), dim, op.given["index"] % shape[dim], axis.ranks))


@rule(_aten.amax, _aten.amin, _aten.any, _aten.all, _aten.logsumexp, _aten.max, _aten.min)
def reduction(op: Operation, axis: ContextAxis) -> Outcome | None:
    """A reduction that gives the same over all tokens as over the results for chunks of them."""
    x = op.given["self"]
    cut, name = op.cut(x), str(op.node.target).split(".")[1]
    given = op.given.get("dim", [])
    dims = [dim % len(shape_of(x)) for dim in (given if isinstance(given, (list, tuple)) else [given])]
    if cut is None or (dims and cut.dim not in dims) or (name in ("max", "min") and "dim" in op.given):
        return rule_of(op.node)(op)  # type: ignore[misc]
    if len(cut.parts) != 1:
        return None
    function = {"max": "amax", "min": "amin"}.get(name, name)
    keepdim = bool(op.given.get("keepdim"))
    return Outcome(
        FULL,
        reduced,
        (Want(x, cut), function, dims or list(range(len(shape_of(x)))), keepdim, cut.dim, axis.size, axis.ranks),
    )


def reduced(x: Tensor, name: str, dims: list[int], keepdim: bool, dim: int, size: int, ranks: str) -> Tensor:
    """Reduce over dims, one of which has this rank's tokens: first each chunk, then the results of all ranks."""
    function = getattr(torch, name)
    chunks = function(torch.stack(x.chunk(2, dim)), [each + 1 for each in dims], keepdim)
    made: Tensor = function(all_tokens(chunks, 0, (2 * size,), ranks), 0)
    return made


# --- counts


@rule(_aten.histc)
def histogram(op: Operation, axis: ContextAxis) -> Outcome | None:
    """A count of elements in given bins: a term."""
    x = op.given["self"]
    cut = op.cut(x)
    between = op.given["min"] < op.given["max"]  # otherwise the bins run from the least to the largest of all tokens
    return op.becomes(TERMS, self=Want(x, cut)) if cut is not None and between else None


@rule(_aten.scatter_add)
def scattered(op: Operation, axis: ContextAxis) -> Outcome | None:
    """Values added at places that tokens name: a term."""
    into, index, source, dim = (op.given[name] for name in ("self", "index", "src", "dim"))
    cut = op.cut(index) or op.cut(source)
    if cut is None or cut.dim != dim % len(shape_of(index)) or op.layout(into) is not FULL:
        return None
    if shape_of(source) != shape_of(index):
        return None
    args = Want(into, FULL), dim, Want(index, cut), Want(source, cut), axis.ranks
    return Outcome(TERMS, scattered_term, args)


def scattered_term(into: Tensor, dim: int, index: Tensor, source: Tensor, ranks: str) -> Tensor:
    """Return this rank's term of the sum; the first rank adds it to the values already there."""
    return on_first(into, ranks).scatter_add(dim, index, source)


@rule(_aten.one_hot)
def one_hot(op: Operation, axis: ContextAxis) -> Outcome | None:
    """A column for each class; the number of classes must be given."""
    x = op.given["self"]
    cut = op.cut(x)
    return None if cut is None or op.given["num_classes"] < 0 else op.becomes(cut, self=Want(x, cut))


@rule(_aten.add, linear=True)
def added_terms(op: Operation, axis: ContextAxis) -> Outcome | None:
    """Sum two terms, or a term and a full value, which only the first rank adds: sums of counts stay terms."""
    x, y = op.given["self"], op.given["other"]
    if not isinstance(x, Node) or not isinstance(y, Node) or {op.layout(x), op.layout(y)} != {TERMS, FULL}:
        found = rule_of(op.node, linear=True)
        return found(op) if found is not None else None
    args = tuple(Want(each, op.layout(each)) for each in (x, y))
    return Outcome(TERMS, sum_with_term, (*args, op.layout(x) is FULL, op.given["alpha"], axis.ranks))


def sum_with_term(x: Tensor, y: Tensor, is_first_full: bool, alpha: float, ranks: str) -> Tensor:
    """Return this rank's term of the sum of a term and a full value."""
    x, y = (on_first(x, ranks), y) if is_first_full else (x, on_first(y, ranks))
    return torch.add(x, y, alpha=alpha)


# --- losses

_NONE, _MEAN, _SUM = 0, 1, 2  # numbers of torch's reductions


@rule(_aten.cross_entropy_loss)
def cross_entropy(op: Operation, axis: ContextAxis) -> Outcome | None:
    """Cross-entropy of logits (tokens, classes) or (rows, classes, tokens)."""
    logits, target, weight = (op.given[name] for name in ("self", "target", "weight"))
    cut, reduction, smoothing = op.cut(logits), op.given["reduction"], op.given["label_smoothing"]
    classes = 1 if len(shape_of(logits)) > 1 else 0
    if cut is None or cut.dim == classes:
        return None
    same = shape_of(target) == shape_of(logits)  # probabilities of classes
    own = Want(target, cut if same else cut.at(cut.dim - (cut.dim > classes)))
    ignored = op.given["ignore_index"]
    if reduction == _MEAN:
        if weight is not None and (smoothing or same):
            return None
        args = (Want(logits, cut), own, Want(target, FULL), weight, smoothing, ignored)
        return Outcome(TERMS, cross_entropy_term, args)
    layout = TERMS if reduction == _SUM else own.layout if not same else cut.at(cut.dim - (cut.dim > classes))
    return op.becomes(layout, self=Want(logits, cut), target=own)


def cross_entropy_term(
    logits: Tensor, target: Tensor, all_targets: Tensor, weight: Tensor | None, smoothing: float, ignored: int
) -> Tensor:  # fmt: skip
    """Return this rank's term of the mean over all tokens that are not ignored."""
    total = functional.cross_entropy(
        logits, target, weight, ignore_index=ignored, reduction="sum", label_smoothing=smoothing
    )
    if all_targets.is_floating_point():
        return total / (all_targets.numel() // all_targets.shape[1])
    counts = all_targets != ignored
    return total / (counts.sum() if weight is None else (weight[all_targets.where(counts, 0)] * counts).sum())


@rule(_aten.mse_loss, _aten.l1_loss, _aten.smooth_l1_loss, _aten.huber_loss, _aten.binary_cross_entropy_with_logits)
def elementwise_loss(op: Operation, axis: ContextAxis) -> Outcome | None:
    """A loss between elements and targets of one shape."""
    x, target = op.given["self"], op.given["target"]
    cut = op.cut(x) or op.cut(target)
    if cut is None or shape_of(x) != shape_of(target) or op.given.get("weight") or op.given.get("pos_weight"):
        return None
    changed = {"self": Want(x, cut), "target": Want(target, cut)}
    if op.given["reduction"] == _MEAN:  # every rank has the same number of elements
        options = {name: value for name, value in op.node.kwargs.items() if name not in changed}
        return Outcome(TERMS, mean_term, (op.node.target, *op.becomes(TERMS, **changed).args), {**options, "size": op.size})
    return op.becomes(cut if op.given["reduction"] == _NONE else TERMS, **changed)


def mean_term(function: Callable[..., Tensor], *args: Any, size: int, **kwargs: Any) -> Tensor:
    """Return a term of a mean over `size` ranks with equally many elements each."""
    return function(*args, **kwargs) / size


@rule("autofunc.chunked_entropy")
def chunked_entropy(op: Operation, axis: ContextAxis) -> Outcome | None:
    """Cross-entropy that keeps no logits: a sum over tokens."""
    hidden, labels = op.given["hidden"], op.given["labels"]
    cut = op.cut(hidden)
    return None if cut is None or cut.dim else op.becomes(TERMS, hidden=Want(hidden, cut), labels=Want(labels, cut))


# --- together with a tp axis


@rule("autofunc.moved")
def moved(op: Operation, axis: ContextAxis) -> Outcome | None:
    """An exchange between tp ranks along other dims than the tokens'."""
    x = op.given["x"]
    cut = op.cut(x)
    return None if cut is None or cut.dim == op.given["dim"] else op.becomes(cut, x=Want(x, cut))


@rule("autofunc.moved", linear=True)
def moved_terms(op: Operation, axis: ContextAxis) -> Outcome | None:
    """An exchange between tp ranks of a value that is a term for cp ranks."""
    return op.becomes(TERMS, x=Want(op.given["x"], TERMS))


@rule("autofunc.cross_entropy_of_parts")
def cross_entropy_of_parts(op: Operation, axis: ContextAxis) -> Outcome | None:
    """A sum over tokens whose logits tp ranks cut along the vocabulary."""
    logits, labels = op.given["logits"], op.given["labels"]
    cut = op.cut(logits)
    return None if cut is None or cut.dim else op.becomes(TERMS, logits=Want(logits, cut), labels=Want(labels, cut))


@rule("autofunc.sum_over", linear=True)
def summed_terms(op: Operation, axis: ContextAxis) -> Outcome | None:
    """A term's sum over data parallel ranks."""
    return op.becomes(TERMS, x=Want(op.given["x"], TERMS))


@rule("autofunc.sum_over")
def summed(op: Operation, axis: ContextAxis) -> Outcome | None:
    """The sum over data parallel ranks of what each has for the same tokens."""
    cut = op.cut(op.given["x"])
    return None if cut is None else op.becomes(cut, x=Want(op.given["x"], cut))

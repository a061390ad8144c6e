"""Elementwise operators: a cut value stays cut."""

from __future__ import annotations

from typing import Any

import torch

from autofunc.spreading.layouts import FULL, TERMS, Cut
from autofunc.spreading.operation import Node, Operation, Outcome, Want, shape_of
from autofunc.spreading.rules.table import POINTWISE, rule

_aten = torch.ops.aten


@rule(
    _aten.to, _aten.contiguous, _aten.alias, _aten.detach, _aten.type_as, _aten.zeros_like, _aten.ones_like,
    _aten.full_like, _aten.empty_like, _aten.masked_fill, _aten.hardswish, _aten.log_sigmoid, _aten.log_sigmoid_forward,
    _aten.__and__, _aten.__or__, _aten.__xor__, _aten._to_copy, _aten.lift_fresh_copy, _aten.floor_divide,
    _aten.where, _aten.selu, _aten.celu, _aten.prelu, _aten.hardsigmoid, _aten.relu6, _aten.clone,
)  # fmt: skip
def pointwise(op: Operation) -> Outcome | None:
    """Cut along the same dim as the operand with most dims; operands without that dim are full."""
    cuts = [(each, cut) for each in op.tensors() if (cut := op.cut(each)) is not None]
    if not cuts:
        return None
    first, cut = max(cuts, key=lambda found: len(shape_of(found[0])))
    dims = len(op.shape)
    dim = cut.dim + dims - len(shape_of(first))
    wanted = {each: _along(each, dim - dims + len(shape_of(each)), cut) for each in op.tensors()}
    return Outcome(Cut(dim, cut.parts), op.node.target, *_with(op.node, wanted))  # type: ignore[arg-type]


def _along(node: Node, dim: int, cut: Cut) -> Want:
    shape = shape_of(node)
    return Want(node, Cut(dim, cut.parts) if dim >= 0 and shape[dim] == cut.whole and cut.whole != 1 else FULL)


def _with(node: Node, wanted: dict[Node, Want]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def changed(argument: Any) -> Any:
        if isinstance(argument, Node):
            return wanted.get(argument, argument)
        return [changed(part) for part in argument] if isinstance(argument, (list, tuple)) else argument

    return tuple(changed(each) for each in node.args), {name: changed(each) for name, each in node.kwargs.items()}


POINTWISE.append(pointwise)


# --- terms of a sum


@rule(_aten.add, _aten.sub, linear=True)
def added_terms(op: Operation) -> Outcome | None:
    """The terms of two sums are terms of the sum of both."""
    x, y = op.given["self"], op.given["other"]
    if op.layout(x) is TERMS and op.layout(y) is TERMS:
        return op.becomes(TERMS, self=Want(x, TERMS), other=Want(y, TERMS))
    return None


@rule(_aten.mul, _aten.div, linear=True)
def scaled_terms(op: Operation) -> Outcome | None:
    """A term times a full value."""
    x, y = op.given["self"], op.given["other"]
    if "rounding_mode" in op.given:
        return None
    if op.layout(x) is TERMS and op.layout(y) is FULL:
        return op.becomes(TERMS, self=Want(x, TERMS))
    if op.layout(y) is TERMS and op.layout(x) is FULL and op.node.target is _aten.mul.Tensor:
        return op.becomes(TERMS, other=Want(y, TERMS))
    return None


@rule(_aten.neg, _aten.contiguous, _aten.alias, _aten.clone, linear=True)
def same_terms(op: Operation) -> Outcome | None:
    """Operators that keep a term a term."""
    return op.becomes(TERMS, self=Want(op.given["self"], TERMS))


@rule(_aten.to, linear=True)
def converted_terms(op: Operation) -> Outcome | None:
    """Cast a term, unless the new dtype is larger, which would make the exchange larger too."""
    x = op.given["self"]
    before, after = x.meta["val"].dtype, op.node.meta["val"].dtype
    if not after.is_floating_point or after.itemsize > before.itemsize:
        return None
    return op.becomes(TERMS, self=Want(x, TERMS))

"""Operator schemas: arguments by name, which of them share memory with the results, and which are written to.

The only file that uses `torch._ops` and the schemas behind it, which have no public names; tried with torch 2.13.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

Node = fx.Node

_aten = torch.ops.aten

# Their schemas do not declare it. Autograd must not treat the first as a view; the second returns the result of the
# collective before it.
_SHARES_BESIDE = {_aten._unsafe_view.default: "self", torch.ops._c10d_functional.wait_tensor.default: "tensor"}


@dataclass(frozen=True)
class Schema:
    """An operator's schema, with the names of its arguments."""

    names: tuple[str, ...]  # in order
    defaults: Mapping[str, Any]  # of optional arguments
    written: frozenset[str]  # arguments it writes to
    shared: frozenset[str]  # arguments whose memory its results may share
    is_mutable: bool  # may write to an argument, or change its metadata
    only_shares: bool  # all its results share an argument's memory, and it writes nothing


def is_operator(node: Node) -> bool:
    """Return whether a node calls an operator of torch or of a `torch.library`, rather than a plain Python function."""
    return isinstance(node.target, OpOverload)


def name_of(node: Node) -> str:
    """Return the name of a node's operator, without "aten." and its overload: "add_"."""
    return str(node.target).removeprefix("aten.").partition(".")[0]


def schema_of(node: Node) -> Schema | None:
    """Return the schema of a node's operator; None if it calls none."""
    return _read(node.target) if isinstance(node.target, OpOverload) else None


def arguments(node: Node) -> dict[str, Any]:
    """Return an operator's arguments by name, in schema order, with defaults for those not given.

    Args:
        node: calls an operator.
    """
    schema = schema_of(node)
    assert schema is not None, f"{node.target} is not an operator"
    given = dict(zip(schema.names, node.args, strict=False)) | node.kwargs
    return {name: given.get(name, schema.defaults.get(name)) for name in schema.names}


def takes_tensor(node: Node, argument: Node) -> bool:
    """Return whether a node's operator declares a tensor wherever it receives this argument."""
    if not isinstance(node.target, OpOverload):
        return False
    types = {each.name: str(each.type) for each in node.target._schema.arguments}
    return all(types[name] in _TENSORS for name, value in arguments(node).items() if _reads(value, argument))


_TENSORS = ("Tensor", "Optional[Tensor]")


def _reads(value: Any, node: Node) -> bool:
    return value is node or (isinstance(value, (list, tuple)) and any(part is node for part in value))


def without_out(node: Node) -> Any:
    """Return the functional form of a node's `out=` operator; None if there is none."""
    if not isinstance(node.target, OpOverload):
        return None
    packet = node.target.overloadpacket
    wanted = [(each.name, str(each.type)) for each in node.target._schema.arguments if not each.is_out]
    for name in packet.overloads():
        operator = getattr(packet, name)
        found = [(each.name, str(each.type)) for each in operator._schema.arguments]
        if found == wanted and not operator._schema.is_mutable:
            return operator
    return None


def is_mutable(node: Node) -> bool:
    """Return whether a node's operator may write to one of its arguments, including `out=`."""
    schema = schema_of(node)
    return schema is not None and schema.is_mutable


def is_pointwise(node: Node) -> bool:
    """Return whether a node's operator computes each element of its result from the elements at the same position."""
    return isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags


def is_random(node: Node) -> bool:
    """Return whether an operator's result depends on a random generator, given its arguments.

    Attention, recurrent layers and dropout depend on none if they drop nothing: because of a probability of 0, which may be
    the default, or because they are not in training mode.
    """
    if not isinstance(node.target, OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    given = arguments(node)
    if given.get("train") is False or given.get("training") is False:
        return False
    # a probability may be a tensor, whose value is still unknown
    return all(given[name] != 0 for name in ("dropout_p", "dropout", "p") if name in given)


@cache
def _read(operator: OpOverload) -> Schema:
    schema = operator._schema
    returned = [each.alias_info for each in schema.returns]
    marks = {name for mark in returned if mark is not None for name in mark.before_set}
    shares = any(mark is not None for mark in returned)
    shared, written = set[str](), set[str]()
    for argument in schema.arguments:
        mark = argument.alias_info
        if mark is None:
            continue
        # if an argument's parts are returned as a list (split, unbind), only "*" marks them as its views
        if mark.before_set & marks or (shares and "*" in mark.after_set):
            shared.add(argument.name)
        if mark.is_write:
            written.add(argument.name)
    if operator in _SHARES_BESIDE:
        shared.add(_SHARES_BESIDE[operator])
    return Schema(
        names=tuple(argument.name for argument in schema.arguments),
        defaults={each.name: each.default_value for each in schema.arguments if each.has_default_value()},
        written=frozenset(written),
        shared=frozenset(shared),
        is_mutable=schema.is_mutable,
        only_shares=operator in _SHARES_BESIDE
        or (not schema.is_mutable and bool(returned) and all(mark is not None for mark in returned)),
    )

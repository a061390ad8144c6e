"""Which nodes of a graph share memory, and which write to it."""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from autofunc.graph.schema import arguments, schema_of

Node = fx.Node

_aten = torch.ops.aten

# Normalisations that update their running statistics when an argument says that they take those of the batch. Their
# schemas do not say so.
_UPDATES_STATISTICS = {
    _aten.batch_norm.default: "training",
    _aten._batch_norm_impl_index.default: "training",
    _aten.native_batch_norm.default: "training",
    _aten.cudnn_batch_norm.default: "training",
    _aten.miopen_batch_norm.default: "training",
    _aten.instance_norm.default: "use_input_stats",
}


def aliased(node: Node) -> Node | None:
    """The argument in whose memory a node's result may lie; None where it has memory of its own.

    What is taken out of several views lies in the memory of those together, so that `base_of` leads on from there. What is
    written in place lies where it was.
    """
    if node.op != "call_function":
        return None
    if node.target is getitem:
        several = node.args[0]
        return several if isinstance(several, Node) and aliased(several) is not None else None
    schema = schema_of(node)
    if schema is None:
        return None
    if not schema.shared:
        return _lies_in(node)
    return next((part for name, value in arguments(node).items() if name in schema.shared for part in _nodes(value)), None)


def _lies_in(node: Node) -> Node | None:
    """Of an operator whose schema says nothing: `einsum`, or a dropout that drops nothing, may return a view."""
    own = storages(node)
    return next((read for read in node.all_input_nodes if own & storages(read)), None)


def storages(node: Node) -> set[Any]:
    """The memory that a node's fake values lie in, to be compared: what shares some has shared it when it was traced."""
    value = node.meta.get("val")
    known: tuple[Any, set[Any]] | None = node.meta.get("storages")
    if known is None or known[0] is not value:  # it is asked for again and again, and is not free
        parts = value if isinstance(value, (list, tuple)) else [value]
        tensors = [part for part in parts if isinstance(part, Tensor) and part.layout is torch.strided]
        node.meta["storages"] = known = (value, {part.untyped_storage()._cdata for part in tensors})
    return known[1]


def base_of(node: Node) -> Node:
    """Whose memory a node's value lies in: itself, or what it is a view of, followed to the first."""
    while (lender := aliased(node)) is not None:
        node = lender
    return node


def is_view(node: Node) -> bool:
    """Whether a node only looks at memory that is there, and writes nothing: making it again costs nothing."""
    if node.op != "call_function":
        return False
    if node.target is getitem:
        return isinstance(node.args[0], Node) and is_view(node.args[0])
    schema = schema_of(node)
    return schema is not None and schema.only_shares


def written(node: Node) -> list[Node]:
    """The arguments whose values an operator writes to: in place, as `out=`, and those in lists."""
    schema = schema_of(node)
    if schema is None or node.target is _aten.detach_.default:  # that changes its autograd graph only
        return []
    if node.target in _UPDATES_STATISTICS:
        given = arguments(node)
        updates = given[_UPDATES_STATISTICS[node.target]]
        return [part for name in ("running_mean", "running_var") for part in _nodes(given[name]) if updates]
    return [part for name, value in arguments(node).items() if name in schema.written for part in _nodes(value)]


def is_number(node: Node) -> bool:
    """Whether a node's value is a number that is known only when it runs, and no tensor."""
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool))


def is_copied_first(constant: Node) -> bool:
    """Whether a constant is made anew whenever it is used (`torch.tensor(1.0)`): then only its copy is written to."""
    return all(user.target is _aten.lift_fresh_copy.default for user in constant.users)


def is_all_of_its_memory(node: Node) -> bool:
    """Whether a node's value fills the memory that it lies in."""
    value = node.meta["val"]
    return bool(value.storage_offset() == 0 and value.untyped_storage().nbytes() == value.numel() * value.element_size())


def storage_bytes(node: Node) -> int | None:
    """Bytes of the memory that a node's value lies in; None where its size depends on data."""
    size = base_of(node).meta["val"].untyped_storage().nbytes()
    return None if isinstance(size, torch.SymInt) else int(size)


def _nodes(value: Any) -> list[Node]:
    """The nodes in an argument."""
    parts = value if isinstance(value, (list, tuple)) else [value]
    return [part for part in parts if isinstance(part, Node)]

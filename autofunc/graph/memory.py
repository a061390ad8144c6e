"""Memory of a graph's nodes: which of them share it, and which write to it."""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from autofunc.graph.schema import arguments, schema_of

Node = fx.Node

_aten = torch.ops.aten

# Normalisations that update their running statistics if this argument selects the batch's own. Their schemas do not
# declare it.
_UPDATES_STATISTICS = {
    _aten.batch_norm.default: "training",
    _aten._batch_norm_impl_index.default: "training",
    _aten.native_batch_norm.default: "training",
    _aten.cudnn_batch_norm.default: "training",
    _aten.miopen_batch_norm.default: "training",
    _aten.instance_norm.default: "use_input_stats",
}


def aliased(node: Node) -> Node | None:
    """Return the argument whose memory a node's result may share; None if it has its own.

    An item of a list of views shares the list's memory, so that `base_of` continues from there. The result of an in-place
    write shares the memory written to.
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
    """Return the argument sharing memory if the schema is silent: `einsum` or a no-op dropout may return a view."""
    own = storages(node)
    return next((read for read in node.all_input_nodes if own & storages(read)), None)


def storages(node: Node) -> set[Any]:
    """Return identities of the storages of a node's fake values, for comparison: nodes sharing one shared it in tracing."""
    value = node.meta.get("val")
    known: tuple[Any, set[Any]] | None = node.meta.get("storages")
    if known is None or known[0] is not value:  # called often, and not free
        parts = value if isinstance(value, (list, tuple)) else [value]
        tensors = [part for part in parts if isinstance(part, Tensor) and part.layout is torch.strided]
        node.meta["storages"] = known = (value, {part.untyped_storage()._cdata for part in tensors})
    return known[1]


def base_of(node: Node) -> Node:
    """Return the node whose memory a node's value lies in: itself, or the first in its chain of views."""
    while (lender := aliased(node)) is not None:
        node = lender
    return node


def is_view(node: Node) -> bool:
    """Return whether a node is only a view and writes nothing, so that recomputing it is free."""
    if node.op != "call_function":
        return False
    if node.target is getitem:
        return isinstance(node.args[0], Node) and is_view(node.args[0])
    schema = schema_of(node)
    return schema is not None and schema.only_shares


def written(node: Node) -> list[Node]:
    """Return the arguments whose values an operator writes to: in place, through `out=`, or in lists."""
    schema = schema_of(node)
    if schema is None or node.target is _aten.detach_.default:  # that changes only its autograd graph
        return []
    if node.target in _UPDATES_STATISTICS:
        given = arguments(node)
        updates = given[_UPDATES_STATISTICS[node.target]]
        return [part for name in ("running_mean", "running_var") for part in _nodes(given[name]) if updates]
    return [part for name, value in arguments(node).items() if name in schema.written for part in _nodes(value)]


def is_number(node: Node) -> bool:
    """Return whether a node's value is a number known only at run time, rather than a tensor."""
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool))


def is_copied_first(constant: Node) -> bool:
    """Return whether every use of a constant copies it first (`torch.tensor(1.0)`), so that writes go to the copy."""
    return all(user.target is _aten.lift_fresh_copy.default for user in constant.users)


def is_all_of_its_memory(node: Node) -> bool:
    """Return whether a node's value fills its whole storage."""
    value = node.meta["val"]
    return bool(value.storage_offset() == 0 and value.untyped_storage().nbytes() == value.numel() * value.element_size())


def storage_bytes(node: Node) -> int | None:
    """Return the bytes of the storage of a node's value; None if its size depends on data."""
    size = base_of(node).meta["val"].untyped_storage().nbytes()
    return None if isinstance(size, torch.SymInt) else int(size)


def _nodes(value: Any) -> list[Node]:
    """Return the nodes in an argument."""
    parts = value if isinstance(value, (list, tuple)) else [value]
    return [part for part in parts if isinstance(part, Node)]

"""Which nodes of a graph share memory."""

from __future__ import annotations

from operator import getitem

import torch
from torch import fx

Node = fx.Node

# not marked as views: autograd must not treat the first as one; the second returns what the collective before it made
_UNMARKED = (torch.ops.aten._unsafe_view.default, torch.ops._c10d_functional.wait_tensor.default)


def base_of(node: Node) -> Node:
    """What a node is a view of."""
    while is_view(node):
        node = node.all_input_nodes[0]
    return node


def is_view(node: Node) -> bool:
    """Whether an operator's output shares its first argument's memory, so that making it again costs nothing."""
    target = node.target
    if node.op != "call_function":
        return False
    if target is getitem:
        return is_view(node.args[0])  # type: ignore[arg-type]
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    if target in _UNMARKED:
        return True
    returns = target._schema.returns
    return bool(returns) and all(each.alias_info is not None for each in returns)


def storage_bytes(node: Node) -> int | None:
    """Bytes of the memory that a node's value lies in; None where its size depends on data."""
    size = base_of(node).meta["val"].untyped_storage().nbytes()
    return None if isinstance(size, torch.SymInt) else int(size)

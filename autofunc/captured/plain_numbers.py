"""Numbers that forward makes from tensors (`h * x.max().item()`) stay 0-dim tensors where operators take one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from autofunc.graph.schema import takes_tensor

Node = fx.Node

_aten = torch.ops.aten


def keep_tensors(graph: fx.Graph) -> None:
    """Change a graph in place, so that the host waits for none of these numbers and they may depend on weights.

    They have no gradient.
    """
    for item in [node for node in graph.nodes if node.target is _aten.item.default]:
        found: Any = item.args[0]
        readers = [user for user in item.users if takes_tensor(user, item) and _promotes_alike(user, item, found)]
        if not readers:
            continue
        with graph.inserting_after(item):
            number = graph.call_function(_aten.detach.default, (found,))
        number.meta.update({**item.meta, "val": found.meta["val"].detach()})
        if number.meta["val"].dim():
            with graph.inserting_after(number):
                whole, number = number, graph.call_function(_aten.reshape.default, (number, []))
            number.meta.update({**whole.meta, "val": whole.meta["val"].reshape([])})
        for reader in readers:
            reader.replace_input_with(item, number)
        if not item.users:
            graph.erase_node(item)


def _promotes_alike(reader: Node, item: Node, found: Node) -> bool:
    """True if the result has the same dtype with a 0-dim tensor as with a number, because an operand with dims decides."""
    others = (read.meta.get("val") for read in reader.all_input_nodes if read is not item)
    return any(
        isinstance(other, Tensor) and other.dim() > 0 and _rank(other.dtype) >= _rank(found.meta["val"].dtype)
        for other in others
    )


def _rank(dtype: torch.dtype) -> int:
    return 3 if dtype.is_complex else 2 if dtype.is_floating_point else int(dtype != torch.bool)

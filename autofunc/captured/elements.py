"""An element of all places is a known number; used as an index beyond the end of a dim, it never counts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from autofunc.captured.all_places import is_body
from autofunc.graph.schema import arguments, name_of

Node = fx.Node

_aten = torch.ops.aten

_SAME = ("select", "squeeze", "view", "reshape", "flatten", "unsqueeze", "detach", "alias", "clone", "to", "item")
_INDEXED = ("index", "index_put", "index_put_", "index_select", "embedding")


def fold_elements(graph: fx.Graph) -> None:
    """Change a graph in place, so that it reads no element as a number and no element indexes beyond the end of a dim.

    A mask may have one more column than there are experts: that expert is never chosen, and its results are discarded.
    """
    for begin in [node for node in graph.nodes if is_body(node) and node.args[2] is not None]:
        number: Any = begin.args[2]
        for element in list(_same(begin)):
            for reader in list(element.users):
                if element.target is _aten.item.default:
                    reader.replace_input_with(element, number)
                    if reader.target is _aten.select.int:
                        whole, dim, _ = reader.args
                        reader.update_arg(2, min(number, _size(whole, dim) - 1))
                elif name_of(reader) in _INDEXED:
                    _keep_inside(reader, element, number)
            if element.target is _aten.item.default:
                graph.erase_node(element)


def _same(begin: Node) -> Iterator[Node]:
    """Yield the nodes that hold only a run's element."""
    found = [begin]
    for node in found:
        found += [user for user in node.users if name_of(user) in _SAME and user.args[0] is node and user not in found]
    yield from found


def _keep_inside(reader: Node, element: Node, number: Any) -> None:
    given = arguments(reader)
    if "indices" in given and isinstance(given["indices"], (list, tuple)):
        sizes = [_size(given["self"], dim) for dim, index in enumerate(given["indices"]) if index is element]
    elif "indices" in given:
        sizes = [_size(given["weight"], 0)] if given["indices"] is element else []
    else:
        sizes = [_size(given["self"], given["dim"])] if given["index"] is element else []
    if all(number < size for size in sizes):
        return
    with reader.graph.inserting_before(reader):
        kept = reader.graph.call_function(_aten.clamp.default, (element, None, min(sizes) - 1))
    kept.meta.update(element.meta)
    reader.replace_input_with(element, kept)


def _size(whole: Any, dim: Any) -> int:
    value: Tensor = whole.meta["val"]
    return int(value.shape[dim])

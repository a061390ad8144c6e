"""Collectives of captured stages on CPU, as direct exchanges: every rank sends to every other and sums in rank order.

Between two ranks this sends no more than a ring; between more, small tensors gain from a single round. Sums
run in rank order, so all ranks get the same bits. `links.py` tells why this is faster, and `bench/tensor_parallel.py`
by how much.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor, fx

from autofunc.graph.exchanges import Wait, at_once, exchanges
from autofunc.shard.links import Links, links, suits_sockets

_c10d = torch.ops._c10d_functional
_links: WeakValueDictionary[str, Links] = WeakValueDictionary()  # by group name; `links` keeps them as long as the group

# our own operators, so that captured graphs can name them; registered for the whole process on import
_library = torch.library.Library("autofunc", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("all_reduce(Tensor x, str how, str group) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("all_gather(Tensor x, int size, str group) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("reduce_scatter(Tensor x, str how, int size, str group) -> Tensor")  # type: ignore[no-untyped-call]


def _begin_all_reduce(x: Tensor, how: str, group: str) -> Wait:
    """Begin to combine all ranks' `x` elementwise: their sum or maximum."""
    wait = _links[group].begin([x.contiguous()] * _links[group].size)
    return lambda: _combined(wait(), how)


def _begin_all_gather(x: Tensor, size: int, group: str) -> Wait:
    """Begin to concatenate all ranks' `x` along dim 0."""
    wait = _links[group].begin([x.contiguous()] * size)
    return lambda: torch.cat(wait())


def _begin_reduce_scatter(x: Tensor, how: str, size: int, group: str) -> Wait:
    """Begin to combine all ranks' `x`, for this rank's part of `size` equal ones along dim 0."""
    wait = _links[group].begin(x.contiguous().chunk(size))
    return lambda: _combined(wait(), how)


def _combined(parts: list[Tensor], how: str) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part if how == "sum" else torch.maximum(total, part)
    return total


_BEGUN_BY: dict[str, Callable[..., Wait]] = {
    "all_reduce": _begin_all_reduce, "all_gather": _begin_all_gather, "reduce_scatter": _begin_reduce_scatter,
}  # fmt: skip
for _name, _begin in _BEGUN_BY.items():
    _library.impl(_name, at_once(_begin), "CPU")  # type: ignore[no-untyped-call]
    exchanges(getattr(torch.ops.autofunc, _name).default, _begin)
torch.library.register_fake("autofunc::all_reduce", lambda x, how, group: x.new_empty(x.shape))
torch.library.register_fake(
    "autofunc::all_gather", lambda x, size, group: x.new_empty((size * x.shape[0], *x.shape[1:]))
)  # fmt: skip
torch.library.register_fake(
    "autofunc::reduce_scatter", lambda x, how, size, group: x.new_empty((x.shape[0] // size, *x.shape[1:]))
)


def exchange_directly(graph: fx.Graph, group: dist.ProcessGroup) -> None:
    """Replace collectives over this group by direct exchanges where that is faster, in place.

    Args:
        graph: of local operators and functional collectives.
        group: the tp axis.
    """
    ours = {
        _c10d.all_reduce.default: torch.ops.autofunc.all_reduce.default,
        _c10d.all_gather_into_tensor.default: torch.ops.autofunc.all_gather.default,
        _c10d.reduce_scatter_tensor.default: torch.ops.autofunc.reduce_scatter.default,
    }
    name, connected = group.group_name, links(group)
    if connected is None:
        return
    _links[name] = connected
    for node in list(graph.nodes):
        gathers = node.target is _c10d.all_gather_into_tensor.default
        if node.target not in ours or node.args[-1] != name or not (gathers or node.args[1] in ("sum", "max")):
            continue
        value, waits = node.meta["val"], list(node.users)
        largest = max(value.numel(), node.args[0].meta["val"].numel()) * value.element_size()
        suits = suits_sockets(value.device, largest, group.size())
        if not suits or any(wait.target is not _c10d.wait_tensor.default for wait in waits):
            continue
        with graph.inserting_before(node):
            direct = graph.call_function(ours[node.target], node.args)
        direct.meta.update(node.meta)
        for wait in waits:
            wait.replace_all_uses_with(direct)
            graph.erase_node(wait)
        graph.erase_node(node)
    graph.lint()

"""The processes of a cp axis, and their exchanges of values that other ranks' tokens need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from autofunc.context_parallel.axis import ContextAxis
from autofunc.context_parallel.ranks import known_as
from autofunc.mesh import axis_group
from autofunc.shard.links import Links, links, suits_sockets

_made: WeakKeyDictionary[dist.ProcessGroup, GroupRanks] = WeakKeyDictionary()


def context_axis(mesh: DeviceMesh | None, method: str) -> ContextAxis | None:
    """Return the cp axis of a mesh, whose ranks operators find by name; None without one. All its processes call it."""
    group = axis_group(mesh, "cp")
    if group is None:
        return None
    if group not in _made:
        _made[group] = GroupRanks(group)
        known_as(group.group_name, _made[group])
    return ContextAxis(group.group_name, group.size(), method)


class GroupRanks:
    """The processes of a group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self.rank, self.size = group, group.rank(), group.size()
        self._global = dist.get_process_group_ranks(group)
        self._links = links(group)

    def gather(self, x: Tensor) -> list[Tensor]:
        """See `ContextRanks.gather`."""
        x = x.contiguous()
        direct = self._direct(x)
        if direct is not None:
            return direct.exchange([x] * self.size)
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x, group=self._group)
        return parts

    def reduce_scatter(self, parts: Sequence[Tensor]) -> Tensor:
        """See `ContextRanks.reduce_scatter`."""
        direct = self._direct(parts[0])
        if direct is not None:
            first, *others = direct.exchange([part.contiguous() for part in parts])
            for other in others:
                first = first + other
            return first
        joined = torch.stack(list(parts))
        total = joined.new_empty(joined.shape[1:])
        dist.reduce_scatter_single(total, joined.flatten(0, 1), group=self._group)
        return total

    def rotate(self, x: Tensor) -> Callable[[], Tensor]:
        """See `ContextRanks.rotate`."""
        x, arriving = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        behind, ahead = (self._global[(self.rank + step) % self.size] for step in (-1, 1))
        works = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, x, ahead, self._group), dist.P2POp(dist.irecv, arriving, behind, self._group)]
        )

        def wait() -> Tensor:
            for work in works:
                work.wait()
            return arriving

        return wait

    def _direct(self, x: Tensor) -> Links | None:
        """Return the sockets, if connected and faster; else None."""
        return self._links if suits_sockets(x.device, x.numel() * x.element_size(), self.size) else None

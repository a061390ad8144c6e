"""Sums inside a stage over data parallel ranks, which run it on other rows: for statistics over all rows."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from autofunc.graph.exchanges import exchanges
from autofunc.mesh import DATA_AXES, axis_group

_groups: WeakValueDictionary[str, dist.ProcessGroup] = WeakValueDictionary()  # by name, which captured graphs refer to


class OverData:
    """A `spread.DataSum` over the data parallel axes of a mesh."""

    def __init__(self, mesh: DeviceMesh) -> None:
        found = [axis_group(mesh, axis) for axis in DATA_AXES]
        self._own = [group for group in found if group is not None]
        self.names = [group.group_name for group in self._own]
        self.size = 1
        for group in self._own:
            _groups[group.group_name] = group
            self.size *= group.size()

    @property
    def fingerprint(self) -> Hashable:
        """The groups that a captured stage names."""
        return tuple(self.names)

    def sum(self, x: Tensor) -> Tensor:
        """See `spread.DataSum.sum`."""
        for name in self.names:
            x = torch.ops.autofunc.sum_over(x, name)
        return x


@torch.library.custom_op("autofunc::sum_over", mutates_args=())
def _sum_over(x: Tensor, group: str) -> Tensor:
    """Sum a tensor over the ranks of a group."""
    return _begin(x, group)()


def _begin(x: Tensor, group: str) -> Callable[[], Tensor]:
    total = x.clone(memory_format=torch.contiguous_format)
    work = dist.all_reduce(total, group=_groups[group], async_op=True)

    def wait() -> Tensor:
        work.wait()
        return total

    return wait


exchanges(torch.ops.autofunc.sum_over.default, _begin)


@_sum_over.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape)


def _remember(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.group = inputs[1]


def _backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
    """Sum the cotangents: the loss is a sum over all ranks, and each has read the total."""
    return torch.ops.autofunc.sum_over(cotangent, ctx.group), None


_sum_over.register_autograd(_backward, setup_context=_remember)

"""A stage computed by several processes together, by graphs of their own: everything is a local tensor, inside and outside.

What each rank's graph does, and where it exchanges values, was decided when the model was planned over the axis, see
`spreading`. Here is who they are that exchange.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch.distributed.device_mesh import DeviceMesh

from autofunc.cache import Identity
from autofunc.shard.exchange import exchange_directly
from autofunc.spreading import AxisPlan, along, local_shape

_c10d = torch.ops._c10d_functional


class GroupAxis:
    """A `spreading.Axis` over a process group, by collectives that can be captured."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size, self.rank = group.size(), group.rank()

    @property
    def fingerprint(self) -> Hashable:
        """See `Axis.fingerprint`."""
        return Identity(self.group)

    def all_reduce(self, x: Tensor, how: str) -> Tensor:
        """See `Axis.all_reduce`."""
        return _waited(_c10d.all_reduce(x, how, self.group.group_name))

    def all_gather(self, x: Tensor) -> Tensor:
        """See `Axis.all_gather`."""
        return _waited(_c10d.all_gather_into_tensor(x, self.size, self.group.group_name))

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """See `Axis.reduce_scatter`."""
        return _waited(_c10d.reduce_scatter_tensor(x, "sum", self.size, self.group.group_name))


def _waited(x: Tensor) -> Tensor:
    waited: Tensor = _c10d.wait_tensor(x)
    return waited


class OverGraphs:
    """A `splitting.Partitioning` over a tp axis, of a model whose graphs are those of each rank.

    Args:
        mesh: the tp axis.
        over: how the model is computed over it.
        homes: path of a holder -> canonical name of its parameter.
    """

    def __init__(self, mesh: DeviceMesh, over: AxisPlan, homes: Mapping[str, str]) -> None:
        self.over, self._homes = over, homes
        self._axis = GroupAxis(mesh.get_group())

    @property
    def fingerprint(self) -> Hashable:
        """The group whose collectives a captured stage names."""
        return "graphs", self._axis.fingerprint

    def shape(self, path: str, shape: torch.Size) -> torch.Size:
        """See `Partitioning.shape`."""
        cut = self.over.cuts.get(self._homes[path])
        return shape if cut is None else local_shape(shape, cut, self.over.size)

    def running(self) -> AbstractContextManager[None]:
        """See `Partitioning.running`."""
        return along({self.over.axis: self._axis})

    def parameter(self, path: str, local: Tensor) -> Tensor:
        """See `Partitioning.parameter`."""
        return local.detach()

    def received(self, local: Tensor, placement: Hashable) -> Tensor:
        """See `Partitioning.received`. The stage before made it as this one takes it."""
        return local

    def handed_on(self, value: Tensor, placement: Hashable = None) -> tuple[Tensor, Hashable]:
        """See `Partitioning.handed_on`."""
        return value, None

    def whole(self, value: Tensor) -> Tensor:
        """See `Partitioning.whole`. The graphs of the last stage put together what they return."""
        return value

    def gradient(self, path: str, gradient: Tensor) -> tuple[Tensor, bool]:
        """See `Partitioning.gradient`."""
        return gradient, self._homes[path] in self.over.terms

    def refine(self, graph: fx.Graph) -> None:
        """See `Partitioning.refine`."""
        exchange_directly(graph, self._axis.group)

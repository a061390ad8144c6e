"""A stage computed by several processes together, each with its own graph: values are local tensors inside and outside.

Each rank's graph, and where it exchanges values, was decided when the model was planned over the axis, see
`spreading`. This module supplies the ranks that exchange.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, fx
from torch.distributed.device_mesh import DeviceMesh

from autofunc.shard.exchange import exchange_directly
from autofunc.shard.group_axis import GroupAxis
from autofunc.shard.tensor_parallel import OverTP
from autofunc.spreading import AxisPlan, along, local_shape


class OverGraphs:
    """A `splitting.Partitioning` over a tp axis, for a model with per-rank graphs.

    Args:
        mesh: the tp axis.
        over: the model's plan over it.
        homes: path of a holder -> canonical name of its parameter.
    """

    over_tp = True

    def __init__(self, mesh: DeviceMesh, over: AxisPlan, homes: Mapping[str, str]) -> None:
        self.over, self._homes = over, homes
        self._axis, self._outside = GroupAxis(mesh), OverTP(mesh, {}, over.sequence)

    @property
    def fingerprint(self) -> Hashable:
        """Identifies the group whose collectives a captured stage names."""
        return "graphs", self._axis.fingerprint

    def shape(self, path: str, shape: torch.Size) -> torch.Size:
        """See `Partitioning.shape`."""
        cut = self.over.cuts.get(self._homes[path])
        return shape if cut is None else local_shape(shape, cut, self.over.size)

    @contextmanager
    def running(self) -> Iterator[None]:
        """See `Partitioning.running`. A loss, which is outside the graphs, sees cut logits as DTensors."""
        with along({self.over.axis: self._axis}), self._outside.running():
            yield

    def parameter(self, path: str, local: Tensor) -> Tensor:
        """See `Partitioning.parameter`."""
        return local.detach()

    def received(self, local: Tensor, placement: Hashable) -> Tensor:
        """See `Partitioning.received`. The previous stage made it as this one takes it."""
        return local

    def handed_on(self, value: Tensor, placement: Hashable = None) -> tuple[Tensor, Hashable]:
        """See `Partitioning.handed_on`."""
        return value, None

    def whole(self, value: Tensor) -> Tensor:
        """See `Partitioning.whole`."""
        return self._outside.whole(value)

    def gradient(self, path: str, gradient: Tensor) -> tuple[Tensor, bool]:
        """See `Partitioning.gradient`."""
        return gradient, self._homes[path] in self.over.terms

    def refine(self, graph: fx.Graph) -> None:
        """See `Partitioning.refine`."""
        exchange_directly(graph, self._axis.group)

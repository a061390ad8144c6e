"""The tp axis as graphs and losses see it: capturable collectives over its process group."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from autofunc.cache import Identity

_c10d = torch.ops._c10d_functional


class GroupAxis:
    """A `spreading.Axis` over the process group of a one-axis mesh."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh, self.group = mesh, mesh.get_group()
        self.size, self.rank = self.group.size(), self.group.rank()

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

    def handed_out(self, x: Tensor, dim: int) -> Tensor:
        """See `Axis.handed_out`: a DTensor, from which `af.losses.causal_lm` takes each rank's part."""
        made: Tensor = DTensor.from_local(x, self.mesh, [Shard(dim)], run_check=False)
        return made


def _waited(x: Tensor) -> Tensor:
    waited: Tensor = _c10d.wait_tensor(x)
    return waited

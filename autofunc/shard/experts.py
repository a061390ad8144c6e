"""Experts that are spread over data parallel ranks: who has which, and what they exchange."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from autofunc.errors import MeshError
from autofunc.mesh import axis_size, expert_mesh
from autofunc.model import Model
from autofunc.shard.expert_exchange import GroupPeers, register
from autofunc.shard.expert_rows import own_experts
from autofunc.splitting import Partitioning
from autofunc.splitting.setting import Whole


class SpreadExperts:
    """The experts of a model over the ranks of a mesh.

    Args:
        model: whose.
        mesh: with an axis "dp_shard" that `size` divides; None: the first of ranks that do not exist, for which stages can
            be captured, and nothing can run.
        size: ranks that share the experts.
    """

    def __init__(self, model: Model, mesh: DeviceMesh | None, size: int) -> None:
        self.paths = check_experts(model, size, axis_size(mesh, "dp_shard") if mesh else size, axis_size(mesh, "tp"))
        self.size = size
        self.mesh = None if mesh is None else expert_mesh(mesh, size)
        self.place = 0 if self.mesh is None else self.mesh.get_local_rank("ep")
        name = "nobody"
        if self.mesh is not None:
            group = self.mesh.get_group("ep")
            self._peers = GroupPeers(group)  # operators find it as long as this holds it
            name = group.group_name
            register(name, self._peers)
        self.exchange = ExpertRanks(name, self.place, size)
        self.partitioning: Partitioning = _Apart({path for path in model.spec if model.canonical(path) in self.paths}, size)

    def over_ranks(self, full: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each process's part of whole parameters of experts; all have the same ones, so nothing is sent."""
        if self.mesh is None:
            return dict(full)
        axis, own = self.mesh["ep"], {path: leaf.chunk(self.size)[self.place].clone() for path, leaf in full.items()}
        return {path: DTensor.from_local(part, axis, [Shard(0)], run_check=False) for path, part in own.items()}


class _Apart(Whole):
    """A `Partitioning`: every value is whole, but of experts each process has its part."""

    def __init__(self, holders: Iterable[str], size: int) -> None:
        self._holders, self._size = frozenset(holders), size

    @property
    def fingerprint(self) -> Hashable:  # type: ignore[override]
        """See `Partitioning.fingerprint`."""
        return "experts", self._size

    def shape(self, path: str, shape: torch.Size) -> torch.Size:
        """See `Partitioning.shape`."""
        return torch.Size([shape[0] // self._size, *shape[1:]]) if path in self._holders else shape


def check_experts(model: Model, size: int, dp_shard: int, tp: int = 1) -> frozenset[str]:
    """Canonical paths of the parameters that `size` ranks share.

    Raises:
        MeshError: when the ranks, or the experts, cannot be divided so, naming what would work.
        ModelError: see `Model.expert_paths`.
    """
    if tp > 1:
        raise MeshError(f"expert_parallel={size} and tp={tp}: experts are spread over data parallel ranks only; use tp=1")
    if dp_shard % size:
        raise MeshError(
            f"expert_parallel={size} does not divide dp_shard={dp_shard}, among whose ranks experts are spread; "
            f"{_ways(dp_shard)}"
        )
    paths = model.expert_paths
    if not paths:
        raise MeshError(
            f"expert_parallel={size}, but {model.title} has no routed experts whose parameters are known; use 1, or "
            "af.routed_experts and af.Model(..., experts=[patterns of their parameters])"
        )
    for path in sorted(paths):
        count = model.spec[path].shape[0] if model.spec[path].dim() else 1
        if count % size:
            raise MeshError(
                f"expert_parallel={size} does not divide the {count} experts of {path!r}; "
                f"{_ways(math.gcd(count, dp_shard))}"
            )
    return paths


def _ways(number: int) -> str:
    """What divides it, in words."""
    found = [str(size) for size in range(1, number + 1) if number % size == 0]
    return "only 1 does" if len(found) == 1 else f"{', '.join(found[:-1])} and {found[-1]} do"


class ExpertRanks:
    """A `spread.ExpertExchange` between ranks that operators know by a name, as one of them."""

    def __init__(self, name: str, rank: int, size: int) -> None:
        self._name, self._rank, self.size = name, rank, size

    @property
    def fingerprint(self) -> Hashable:
        """The ranks that a captured stage names, and which of them it is."""
        return self._name, self._rank, self.size

    def counts(self, own: Tensor) -> Tensor:
        """See `spread.ExpertExchange.counts`."""
        made: Tensor = torch.ops.autofunc.expert_counts(own, self._name, self.size)
        return made

    def dispatch(self, rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """See `spread.ExpertExchange.dispatch`."""
        return torch.ops.autofunc.dispatch(rows, counts, self._name), own_experts(counts, self._rank).sum(0)

    def combine(self, made: Tensor, counts: Tensor, rows: int) -> Tensor:
        """See `spread.ExpertExchange.combine`."""
        found: Tensor = torch.ops.autofunc.combine(made, counts, self._name, rows)
        return found

    def sum(self, x: Tensor) -> Tensor:
        """See `spread.ExpertExchange.sum`."""
        total: Tensor = torch.ops.autofunc.expert_sum(x, self._name)
        return total

"""Experts spread over the ranks that share parameters: who has which, and what they exchange."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from autofunc.errors import MeshError, divisors
from autofunc.mesh import axis_size, expert_mesh, folded
from autofunc.model import Model
from autofunc.shard.cut_over_tp import CutOverTP
from autofunc.shard.expert_exchange import GroupPeers, register
from autofunc.shard.expert_rows import own_experts
from autofunc.shard.fused import remember
from autofunc.splitting import WHOLE, Partitioning
from autofunc.spreading import piece_of

_NOTHING = CutOverTP({})


class SpreadExperts:
    """The experts of a model over the ranks of a mesh.

    Each of `size` ranks holds a run of E / size experts. Ranks along tp hold the same experts, of each the part that the tp
    table cuts, and exchange the same rows.

    Args:
        model: whose experts.
        mesh: its axes "dp_shard" and "cp" together have a multiple of `size` ranks; None: the first of imagined ranks, for
            which stages can be captured, though not run.
        size: ranks that share the experts.
        cut: how tp ranks share the model.
        within: how the values of a stage lie apart from its experts.

    Raises:
        MeshError: see `check_experts`.
        ModelError: see `Model.expert_paths`.
    """

    def __init__(
        self, model: Model, mesh: DeviceMesh | None, size: int, cut: CutOverTP = _NOTHING, within: Partitioning = WHOLE
    ) -> None:
        shard, cp, tp = (axis_size(mesh, axis) for axis in ("dp_shard", "cp", "tp"))
        self.paths = check_experts(model, size, shard if mesh is not None else size, cp, tp, cut)
        self.size, self._cuts = size, cut.params
        whole = folded(mesh)
        self.mesh = None if whole is None else expert_mesh(whole, size)
        self.place = 0 if self.mesh is None else self.mesh.get_local_rank("ep")
        name = "nobody"
        if self.mesh is not None:
            group = self.mesh.get_group("ep")
            self._peers = GroupPeers(group)  # operators find it as long as this holds it
            name = group.group_name
            register(name, self._peers)
            if tp > 1:
                remember(self.mesh.get_group("tp"), {path: cut.params[path] for path in cut.params.keys() & self.paths})
        self.exchange = ExpertRanks(name, self.place, size, averages=size % cp == 0 and size > cp)
        holders = frozenset(path for path in model.spec if model.canonical(path) in self.paths)
        self.partitioning: Partitioning = _Apart(within, holders, size)

    def over_ranks(self, full: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this process's part of whole experts' parameters. All processes have the same ones: nothing is sent."""
        if self.mesh is None:
            return dict(full)
        tp = axis_size(self.mesh, "tp")
        axes = self.mesh["ep", "tp"] if tp > 1 else self.mesh["ep"]
        leaves: dict[str, Tensor] = {}
        for path, leaf in full.items():
            part, cut = leaf.chunk(self.size)[self.place], self._cuts.get(path)
            placements: list[Shard | Replicate] = [Shard(0)]
            if tp > 1:
                placements.append(Replicate() if cut is None else Shard(cut.dim))
            if cut is not None:
                part = piece_of(part, cut, tp, self.mesh.get_local_rank("tp"))
            own = part.clone(memory_format=torch.contiguous_format)
            leaves[path] = DTensor.from_local(own, axes, placements, run_check=False)
        return leaves


class _Apart:
    """A `Partitioning` like another one, except that each process holds its part of the experts.

    Args:
        within: the other one.
        holders: paths of the experts' parameters.
        size: ranks that share them.
    """

    def __init__(self, within: Partitioning, holders: frozenset[str], size: int) -> None:
        self._within, self._holders, self._size = within, holders, size
        self.over, self.over_tp = within.over, within.over_tp
        self.running, self.parameter = within.running, within.parameter
        self.received, self.handed_on, self.whole = within.received, within.handed_on, within.whole
        self.gradient, self.refine = within.gradient, within.refine

    @property
    def fingerprint(self) -> Hashable:
        """See `Partitioning.fingerprint`."""
        return "experts", self._size, self._within.fingerprint

    def shape(self, path: str, shape: torch.Size) -> torch.Size:
        """See `Partitioning.shape`."""
        own = torch.Size([shape[0] // self._size, *shape[1:]]) if path in self._holders else shape
        return self._within.shape(path, own)


def check_experts(
    model: Model, size: int, dp_shard: int, cp: int = 1, tp: int = 1, cut: CutOverTP = _NOTHING
) -> frozenset[str]:
    """Return the canonical paths of the parameters that `size` ranks share.

    Args:
        model: whose experts.
        size: ranks that share them.
        dp_shard, cp, tp: sizes of the mesh's axes.
        cut: how tp ranks share the model.

    Raises:
        MeshError: if the ranks or the experts do not divide, or layers cannot be cut over tp beside it; names what works.
        ModelError: see `Model.expert_paths`.
    """
    paths = model.expert_paths
    if not paths:
        raise MeshError(
            f"expert_parallel={size}, but {model.title} has no routed experts whose parameters are known; use 1, or "
            "af.routed_experts and af.Model(..., experts=[patterns of their parameters])"
        )
    ranks = dp_shard * cp
    counts = {path: model.spec[path].shape[0] if model.spec[path].dim() else 1 for path in sorted(paths)}
    working = _ways(math.gcd(ranks, *counts.values()))
    if ranks % size:
        sharing = f"dp_shard={dp_shard}" + (f" x cp={cp}" if cp > 1 else "")
        raise MeshError(
            f"expert_parallel={size} does not divide {sharing}, among whose ranks experts are spread; {working}"
        )
    for path, count in counts.items():
        if count % size:
            raise MeshError(f"expert_parallel={size} does not divide the {count} experts of {path!r}; {working}")
    if tp > 1 and cut.over is None:
        raise MeshError(
            f"expert_parallel={size} and tp={tp}, and the layers of {model.title} are functions, which cannot be cut over "
            "both; use expert_parallel=1 or tp=1, or a captured module"
        )
    for path in sorted(cut.params.keys() & paths):
        if cut.params[path].dim == 0:
            raise MeshError(
                f"expert_parallel={size} and tp={tp}: the tp table cuts {path!r} along dim 0, its experts, which "
                "expert_parallel spreads; cut another dim, use expert_parallel=1, or tp=1"
            )
    return paths


def _ways(number: int) -> str:
    """List the divisors of a number, as a sentence."""
    found = divisors(number)
    return "only 1 does" if len(found) == 1 else f"{', '.join(found[:-1])} and {found[-1]} do"


class ExpertRanks:
    """A `spread.ExpertExchange` between ranks that operators know by name, as seen by one of them.

    Args:
        name: of the ranks, see `expert_exchange.register`.
        rank: this one.
        size: how many they are.
        averages: whether they see different rows, so that statistics of tokens are averaged. Along cp they share rows, and
            statistics are already those of whole rows.
    """

    def __init__(self, name: str, rank: int, size: int, *, averages: bool = True) -> None:
        self._name, self._rank, self.size, self._averages = name, rank, size, averages

    @property
    def fingerprint(self) -> Hashable:
        """The ranks that a captured stage names, and this one's number."""
        return self._name, self._rank, self.size, self._averages

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

    def mean(self, x: Tensor) -> Tensor:
        """See `spread.ExpertExchange.mean`."""
        if not self._averages:
            return x
        total: Tensor = torch.ops.autofunc.expert_sum(x, self._name)
        return total / self.size

"""How a process holds its parameters, and how a step comes by them.

Without data parallel shards a leaf of a tree is a plain tensor, or a DTensor over the tp axis; with them it is a DTensor
that `fully_shard` made. A stage computes with local tensors: whole over dp_shard, this process's part over tp, in the
precision of the policy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import OffloadPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard

from autofunc import tree
from autofunc.context_parallel.axis import ContextAxis
from autofunc.engine.recordable import check_axes
from autofunc.errors import AutofuncError, MeshError, ModelError
from autofunc.mesh import axis_size, coordinate, data_coordinate, folded
from autofunc.model import Model, cut_dims
from autofunc.shard.context_ranks import context_axis
from autofunc.shard.data_sum import OverData
from autofunc.shard.dtensors import gathered, local
from autofunc.shard.fsdp import Group, ShardedTree, Storages
from autofunc.shard.fused import remember
from autofunc.shard.options import Sharding
from autofunc.shard.over_graphs import OverGraphs
from autofunc.shard.reduce import shard_shape, with_rows
from autofunc.shard.tensor_parallel import OverTP
from autofunc.splitting import WHOLE, Partitioning, Setting, Stage
from autofunc.spreading import DERIVED, AxisPlan, Cut, piece_of, put_together

Full = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Makes whole parameters with these canonical paths."""


class Parameters:
    """The parameters of this process's stages.

    Args:
        stages: the stages that this process runs.
        mesh: None when it runs all of them.
        sharding: the choices.
        context: cp ranks beside this process that do not exist, to find out what stages would keep.

    Raises:
        MeshError: when the model cannot be cut over the tp axis.
        ModelError: for a placement table that does not fit the model.
        AutofuncError: for policies that need a mesh.
    """

    def __init__(
        self, stages: Sequence[Stage], model: Model, mesh: DeviceMesh | None, sharding: Sharding,
        context: ContextAxis | None = None,
    ) -> None:  # fmt: skip
        self.stages, self.model, self.sharding = stages, model, sharding
        self.rows_mesh, self.mesh = mesh, folded(mesh)
        mesh = self.mesh
        self.paths = sorted({path for stage in stages for path in stage.paths}, key=tree.split_path)
        offloads = type(sharding.offload_policy) is not OffloadPolicy
        if mesh is None and (offloads or sharding.sequence_parallel):
            choice = "offload_policy" if offloads else "sequence_parallel"
            raise AutofuncError(f"sharding: {choice} needs a mesh; make one with af.make_mesh")
        self.dp_shard = axis_size(mesh, "dp_shard")
        self.is_sharded = self.dp_shard > 1 or offloads
        cut = cut_over_tp(model, axis_size(mesh, "tp"), sharding)
        self._cut = cut.params
        self.partitioning: Partitioning = WHOLE
        if mesh is not None and axis_size(mesh, "tp") > 1:
            homes = {path: model.canonical(path) for path in model.spec}
            if cut.over is not None:
                self.partitioning = OverGraphs(mesh["tp"], cut.over, homes)
                remember(mesh.get_group("tp"), self._cut)
            else:
                dims = {path: self._cut[home].dim for path, home in homes.items() if home in self._cut}
                self.partitioning = OverTP(mesh["tp"], dims, sharding.sequence_parallel)
        rows = self.rows_mesh
        data = OverData(rows) if rows is not None and data_coordinate(rows)[1] > 1 else None
        context = context or context_axis(rows, sharding.context_parallel)
        if context is not None and isinstance(self.partitioning, OverTP):
            raise MeshError(
                f"the mesh has cp={context.size} and tp={axis_size(mesh, 'tp')}, and the layers of {model.title} are "
                "functions, which cannot be cut over both; use cp=1 or tp=1, or a captured module"
            )
        self.setting = Setting(
            self.partitioning, sharding.precision, data, arrive_by_layer=self.is_sharded, context=context
        )

    @property
    def unshard(self) -> str:
        """How often a stage's parameters are gathered, see `schedule.lower`."""
        if not self.is_sharded:
            return "never"
        return "each_use" if self.sharding.reshard_after_forward else "once"

    @property
    def has_reduce_actions(self) -> bool:
        """Whether the lowered schedule says when gradients are summed over data parallel ranks."""
        return self.is_sharded or axis_size(self.mesh, "dp_replicate") > 1

    @cached_property
    def groups(self) -> list[Group]:
        """What is gathered together: the parameters of each layer; one that several use goes with the first."""
        found: dict[str, str] = {}
        for stage in self.stages:
            for holder in stage.holders:
                found.setdefault(self.model.canonical(holder), self.model.layer_of(holder) or "")
        return [
            tuple(path for path in self.paths if found[path] == layer)
            for layer in self.model.layers
            if layer in set(found.values())
        ]

    @cached_property
    def _groups_of(self) -> dict[int, list[Group]]:
        """By stage: what holds its parameters, in the order in which its layers need it."""
        return {
            stage: list(dict.fromkeys(group for groups in by_layer for group in groups))
            for stage, by_layer in self._groups_by_layer.items()
        }

    @cached_property
    def _groups_by_layer(self) -> dict[int, list[list[Group]]]:
        """By stage and position of the layer: what holds the layer's parameters."""
        home = {path: group for group in self.groups for path in group}
        found: dict[int, list[list[Group]]] = {}
        for stage in self.stages:
            by_layer: dict[str, dict[Group, None]] = {name: {} for name in stage.layers}
            for holder in stage.holders:
                by_layer[self.model.layer_of(holder) or ""][home[self.model.canonical(holder)]] = None
            found[stage.index] = [list(groups) for groups in by_layer.values()]
        return found

    def local_shape(self, path: str) -> torch.Size:
        """Shape of the part of a parameter, or of its gradient, that this process holds; for any parameter of the model."""
        shape = self.partitioning.shape(path, self.model.spec[path].shape)
        return shard_shape(shape, self.dp_shard, coordinate(self.mesh, "dp_shard"))

    # --- trees

    def make(self, full: Full) -> dict[str, Tensor]:
        """The leaves of this process, layer by layer: no more than one layer is whole at a time."""
        if self.is_sharded:
            return dict(self._storages.add(lambda group: self._over_tp(_with_rows(full(group)))).sharded)
        return {path: leaf for group in self.groups for path, leaf in self._over_tp(full(group)).items()}

    def full(self, path: str, leaf: Tensor) -> Tensor:
        """A leaf put together from all ranks of the dp_shard and tp axes, which all call it; a copy."""
        whole, cut = gathered(leaf).view(self.full_shape(path, leaf)), self._cut.get(path)
        if cut is None or len(cut.parts) == 1 or not isinstance(leaf, DTensor):
            return whole
        return put_together(whole.chunk(axis_size(self.mesh, "tp"), cut.dim), cut)

    def full_shape(self, path: str, leaf: Tensor) -> torch.Size:
        """The shape that `full` gives a leaf."""
        return self.model.spec[path].shape if isinstance(leaf, DTensor) else leaf.shape

    @property
    def _is_spread(self) -> bool:
        return self.is_sharded or self.partitioning is not WHOLE

    def lies_right(self, leaf: Tensor) -> bool:
        """Whether a leaf is a DTensor where it should be one; a meta tensor stands for any."""
        return leaf.is_meta or isinstance(leaf, DTensor) == self._is_spread

    def laid_out(self, flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Meta tensors like the parameters that stages compute with as they are given; shards are put together anew."""
        if self._is_spread:
            return {}
        return {
            path: torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
            for path, leaf in flat.items()
        }

    def check(self, flat: Mapping[str, Tensor]) -> None:
        """Refuse a tree that does not lie as this process's parameters do.

        Raises:
            ModelError: naming the parameter.
        """
        for path in self.paths:
            leaf, shape = self.model.lookup(flat, path), self.model.spec[path].shape
            expected_shape = tuple(with_rows(shape) if self.is_sharded and not leaf.is_meta else shape)
            if tuple(leaf.shape) != expected_shape:
                raise ModelError(f"parameter {path!r} has shape {tuple(leaf.shape)}; expected {expected_shape}")
            if leaf.is_meta:
                continue
            if not self.lies_right(leaf) or local(leaf).shape != self.local_shape(path):
                expected = "a DTensor over the mesh" if self._is_spread else "a plain tensor"
                raise ModelError(
                    f"parameter {path!r} is a {type(leaf).__name__} of shape {tuple(leaf.shape)}, of which this rank has "
                    f"{tuple(local(leaf).shape)}; expected {expected}, of which it has {tuple(self.local_shape(path))}: "
                    "params come from pipe.init or pipe.place of this pipeline, or one with the same mesh"
                )

    def check_fixed(self) -> None:
        """Refuse parameters that do not stay where they are in a step, and stages that exchange values.

        Raises:
            AutofuncError: with the reason.
        """
        check_axes(self.is_sharded, self.partitioning is not WHOLE)

    # --- one step

    def step(self, flat: Mapping[str, Tensor]) -> StepParameters:
        """What a step computes with.

        Args:
            flat: canonical path -> leaf, of all parameters of this process.
        """
        if self.is_sharded:
            return StepParameters(self, flat, self._storages.of(flat))
        return StepParameters(self, flat, None)

    @cached_property
    def _storages(self) -> Storages:
        assert self.mesh is not None
        mesh, device = self.mesh, torch.device(self.mesh.device_type)

        def blank(group: Group, like: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return self._over_tp(
                {path: torch.empty(like[path].shape, dtype=like[path].dtype, device=device) for path in group}
            )  # fmt: skip

        return Storages(lambda make: ShardedTree(self.groups, make, mesh, self.sharding), blank)

    def _over_tp(self, full: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each process's part of whole parameters; all have the same ones, so nothing is sent."""
        if self.mesh is None or self.partitioning is WHOLE:
            return dict(full)
        axis, size, place = self.mesh["tp"], axis_size(self.mesh, "tp"), coordinate(self.mesh, "tp")
        leaves: dict[str, Tensor] = {}
        for path, leaf in full.items():
            cut = self._cut.get(path)
            part = leaf if cut is None else piece_of(leaf, cut, size, place).clone(memory_format=torch.contiguous_format)
            placement = Replicate() if cut is None else Shard(cut.dim)
            leaves[path] = DTensor.from_local(part, axis, [placement], run_check=False)
        return leaves


def _with_rows(full: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {path: leaf.view(with_rows(leaf.shape)) for path, leaf in full.items()}


class StepParameters:
    """Comes by the parameters of stages in one step.

    Args:
        parameters: how this process holds them.
        flat: the leaves of this step.
        storage: where sharded ones lie.
    """

    def __init__(self, parameters: Parameters, flat: Mapping[str, Tensor], storage: ShardedTree | None) -> None:
        self._parameters, self._flat, self._storage = parameters, flat, storage
        self._cast: dict[str, Tensor] = {}

    def gather(self, stage: int) -> None:
        """Start to gather a stage's parameters."""
        if self._storage is not None:
            self._storage.gather(self._parameters._groups_of[stage])

    def release(self, stage: int) -> None:
        """Let go of a stage's gathered parameters."""
        if self._storage is not None:
            self._storage.release(self._parameters._groups_of[stage])

    def leaves(self, stage: Stage) -> list[Tensor]:
        """Local tensors for all holders of a stage, in order; sharded ones may still be on their way."""
        canonical = (self._parameters.model.canonical(path) for path in stage.holders)
        if self._storage is not None:
            storage = self._storage
            spec = self._parameters.model.spec
            return [storage.whole(path).view(()) if not spec[path].dim() else storage.whole(path) for path in canonical]
        return [self._cast_once(path) for path in canonical]

    def ready(self, stage: int) -> Callable[[int], None] | None:
        """Waits for the parameters of a layer of a stage, by its position; None where there is nothing to wait for."""
        if self._storage is None:
            return None
        arrive, groups = self._storage.arrive, self._parameters._groups_by_layer[stage]
        return lambda layer: arrive(groups[layer])

    def arrive(self, stage: int) -> None:
        """Wait until all of a stage's parameters are gathered."""
        if self._storage is not None:
            self._storage.arrive(self._parameters._groups_of[stage])

    @property
    def num_bytes(self) -> int:
        """Bytes of the parameters that are in memory now."""
        if self._storage is not None:
            return self._storage.num_bytes
        held = [local(self._parameters.model.lookup(self._flat, path)) for path in self._parameters.paths]
        return sum(leaf.numel() * leaf.element_size() for leaf in [*held, *self._cast.values()])

    def end(self) -> None:
        """After the step, or when it failed: nothing stays gathered."""
        if self._storage is not None:
            self._storage.release_all()

    def _cast_once(self, path: str) -> Tensor:
        """A parameter that need not be gathered: cast once a step, if at all."""
        leaf = local(self._parameters.model.lookup(self._flat, path)).detach()
        dtype = self._parameters.sharding.precision.parameter_dtype(leaf.dtype)
        if dtype == leaf.dtype:
            return leaf
        if path not in self._cast:
            self._cast[path] = leaf.to(dtype)
        return self._cast[path]


@dataclass(frozen=True)
class CutOverTP:
    """How tp ranks share a model."""

    params: Mapping[str, Cut]  # by canonical path; others are whole on every rank
    over: AxisPlan | None = None  # of a model whose graphs are those of each rank


def cut_over_tp(model: Model, size: int, sharding: Sharding) -> CutOverTP:
    """What `size` tp ranks cut.

    Raises:
        MeshError: when the model has no placement table, or something does not divide.
        ModelError: for a table that does not fit the model, also where there is nothing to cut.
    """
    canonical = {path: leaf for path, leaf in model.spec.items() if path not in model.ties}
    given = sharding.tensor_parallel
    if size == 1:
        if given is None or isinstance(given, str):
            return CutOverTP({})
        table = None  # its patterns are checked all the same
        if model.over_ranks("tp", 1, given, sequence=False) is None:
            table = sharding.table(model.tensor_parallel)
        if table is not None:
            cut_dims(table, canonical, 1)
        return CutOverTP({})
    if model.uncut is not None:
        raise MeshError(f"the mesh has tp={size}, but {model.uncut}; use tp=1, or a model of named layers with a table")
    over = model.over_ranks("tp", size, given, sequence=sharding.sequence_parallel)
    if over is not None:
        return CutOverTP(over.cuts, over)
    if given == DERIVED:
        raise ModelError(f"tensor_parallel={given!r} is read from the graph of a captured module; {model.title} is none")
    table = sharding.table(model.tensor_parallel)
    if table is None:
        raise MeshError(
            f"the mesh has tp={size}, but the model has no placement table for its parameters; give it one "
            "(af.Model(..., tensor_parallel=...) or af.Sharding(tensor_parallel={'*.weight': 'shard(0)'})), or use tp=1"
        )
    dims = cut_dims(model.spread_by(table), canonical, size)
    return CutOverTP({path: Cut(dim, (canonical[path].shape[dim],)) for path, dim in dims.items()})

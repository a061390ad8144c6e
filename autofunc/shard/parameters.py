"""How a process holds its parameters, and how a step gets them.

Without data parallel shards a leaf of a tree is a plain tensor, or a DTensor over the tp axis; with them, a DTensor
that `fully_shard` made. A stage computes with local tensors: whole over dp_shard, this process's part over tp, in the
precision of the policy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from autofunc.model import Model
from autofunc.shard.context_ranks import context_axis
from autofunc.shard.cut_over_tp import by_layer, cut_over_tp
from autofunc.shard.data_sum import OverData
from autofunc.shard.dtensors import gathered, local
from autofunc.shard.experts import SpreadExperts
from autofunc.shard.fsdp import Group, ShardedTree, Storages
from autofunc.shard.fused import remember
from autofunc.shard.options import Sharding
from autofunc.shard.over_graphs import OverGraphs
from autofunc.shard.reduce import Reduction, shard_shape, with_rows
from autofunc.shard.step_parameters import StepParameters
from autofunc.shard.tensor_parallel import OverTP
from autofunc.splitting import WHOLE, Partitioning, Setting, Stage
from autofunc.spreading import piece_of, put_together

Full = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Makes the whole parameters with these canonical paths."""


class Parameters:
    """The parameters of this process's stages.

    Args:
        stages: the stages that this process runs.
        mesh: None if it runs all of them.
        sharding: the sharding options.
        context: an imagined cp axis, to find out what stages would keep.

    Raises:
        MeshError: if the model cannot be cut over the mesh's axes.
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
        tp, rows = axis_size(mesh, "tp"), self.rows_mesh
        context = context or context_axis(rows, sharding.context_parallel)
        if context is not None and tp > 1 and sharding.sequence_parallel:
            raise MeshError(
                f"sequence_parallel on a mesh with cp={context.size} and tp={tp}: cp ranks cut tokens already; leave it "
                "out, or use cp=1"
            )
        cut = cut_over_tp(model, tp, sharding)
        over = cut.over if context is None or cut.over is not None else by_layer(cut, model, tp, sharding.sequence_parallel)
        self._cut = cut.params
        self.partitioning: Partitioning = WHOLE
        if mesh is not None and tp > 1:
            homes = {path: model.canonical(path) for path in model.spec}
            if over is not None:
                self.partitioning = OverGraphs(mesh["tp"], over, homes)
                remember(mesh.get_group("tp"), self._cut)
            else:
                dims = {path: self._cut[home].dim for path, home in homes.items() if home in self._cut}
                self.partitioning = OverTP(mesh["tp"], dims, sharding.sequence_parallel)
        self.experts: SpreadExperts | None = None
        if sharding.expert_parallel > 1:
            self.experts = SpreadExperts(model, rows, sharding.expert_parallel, cut, self.partitioning)
            self.partitioning = self.experts.partitioning
        data = OverData(rows) if rows is not None and data_coordinate(rows)[1] > 1 else None
        exchange = self.experts.exchange if self.experts is not None else None
        self.setting = Setting(
            self.partitioning,
            sharding.precision,
            data,
            exchange,
            arrive_by_layer=self.is_sharded,
            context=context,
        )

    def exchanges_in(self, stage: Stage) -> bool:
        """Return whether processes exchange values inside a stage, and can compute something else meanwhile.

        The same on all processes. Attention over cp ranks does not count: it waits inside its operators.
        """
        if self.mesh is None:
            return False
        with_experts = self.experts is not None and any(
            self.model.canonical(holder) in self.experts.paths for holder in stage.holders
        )
        return with_experts or axis_size(self.mesh, "tp") > 1

    @property
    def unshard(self) -> str:
        """How often a stage's parameters are gathered, see `schedule.lower`."""
        if not self.is_sharded:
            return "never"
        return "each_use" if self.sharding.reshard_after_forward else "once"

    @property
    def has_reduce_actions(self) -> bool:
        """True if the lowered schedule has actions that sum gradients over data parallel ranks."""
        return self.is_sharded or axis_size(self.mesh, "dp_replicate") > 1

    @cached_property
    def groups(self) -> list[Group]:
        """Parameters gathered together: a layer's, spread experts separately; shared ones go with their first layer."""
        found: dict[str, str] = {}
        for stage in self.stages:
            for holder in stage.holders:
                found.setdefault(self.model.canonical(holder), self.model.layer_of(holder) or "")
        apart = self.experts.paths if self.experts is not None else frozenset()
        groups = (
            tuple(path for path in self.paths if found[path] == layer and (path in apart) == is_expert)
            for layer in self.model.layers
            if layer in set(found.values())
            for is_expert in (False, True)
        )
        return [group for group in groups if group]

    @cached_property
    def _groups_of(self) -> dict[int, list[Group]]:
        """Groups that hold a stage's parameters, by stage, in the order in which its layers need them."""
        return {
            stage: list(dict.fromkeys(group for groups in by_layer for group in groups))
            for stage, by_layer in self._groups_by_layer.items()
        }

    @cached_property
    def _groups_by_layer(self) -> dict[int, list[list[Group]]]:
        """Groups that hold a layer's parameters, by stage and position of the layer."""
        home = {path: group for group in self.groups for path in group}
        found: dict[int, list[list[Group]]] = {}
        for stage in self.stages:
            by_layer: dict[str, dict[Group, None]] = {name: {} for name in stage.layers}
            for holder in stage.holders:
                by_layer[self.model.layer_of(holder) or ""][home[self.model.canonical(holder)]] = None
            found[stage.index] = [list(groups) for groups in by_layer.values()]
        return found

    def local_shape(self, path: str) -> torch.Size:
        """Return the shape of this process's part of a parameter of the model, or of its gradient."""
        shape = self.partitioning.shape(path, self.model.spec[path].shape)
        if self.experts is not None and self.model.canonical(path) in self.experts.paths:
            return shard_shape(shape, axis_size(self.experts.mesh, "edp"), coordinate(self.experts.mesh, "edp"))
        return shard_shape(shape, self.dp_shard, coordinate(self.mesh, "dp_shard"))

    # --- trees

    def make(self, full: Full) -> dict[str, Tensor]:
        """Make the leaves of this process layer by layer, so that only one layer is whole at a time."""
        if self.is_sharded:
            return dict(self._storages.add(lambda group: self._parts(_with_rows(full(group)))).sharded)
        return {path: leaf for group in self.groups for path, leaf in self._parts(full(group)).items()}

    def full(self, path: str, leaf: Tensor) -> Tensor:
        """Gather a leaf from all ranks of the dp_shard and tp axes, which all call it; return a copy."""
        whole, cut = gathered(leaf).view(self.full_shape(path, leaf)), self._cut.get(path)
        if cut is None or len(cut.parts) == 1 or not isinstance(leaf, DTensor):
            return whole
        return put_together(whole.chunk(axis_size(self.mesh, "tp"), cut.dim), cut)

    def full_shape(self, path: str, leaf: Tensor) -> torch.Size:
        """Return the shape that `full` gives a leaf."""
        return self.model.spec[path].shape if isinstance(leaf, DTensor) else leaf.shape

    @property
    def _is_spread(self) -> bool:
        return self.is_sharded or (self.partitioning is not WHOLE and not self._is_imagined)

    @property
    def _is_imagined(self) -> bool:
        """True if experts are spread over imagined ranks."""
        return self.experts is not None and self.mesh is None

    def lies_right(self, leaf: Tensor) -> bool:
        """Return whether a leaf is a DTensor exactly if it should be one; a meta tensor stands for either."""
        return leaf.is_meta or isinstance(leaf, DTensor) == self._is_spread

    def laid_out(self, flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return meta tensors like the parameters that stages use as given; none if leaves are only parts."""
        if self._is_spread:
            return {}
        return {
            path: torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
            for path, leaf in flat.items()
        }

    def check(self, flat: Mapping[str, Tensor]) -> None:
        """Refuse a tree without the layout of this process's parameters.

        Raises:
            ModelError: naming the parameter.
        """
        for path in self.paths:
            leaf, shape = self.model.lookup(flat, path), self.model.spec[path].shape
            expected_shape = tuple(with_rows(shape) if self.is_sharded and not leaf.is_meta else shape)
            if tuple(leaf.shape) != expected_shape:
                raise ModelError(f"parameter {path!r} has shape {tuple(leaf.shape)}; expected {expected_shape}")
            if leaf.is_meta or self._is_imagined:
                continue
            if not self.lies_right(leaf) or local(leaf).shape != self.local_shape(path):
                expected = "a DTensor over the mesh" if self._is_spread else "a plain tensor"
                raise ModelError(
                    f"parameter {path!r} is a {type(leaf).__name__} of shape {tuple(leaf.shape)}, of which this rank has "
                    f"{tuple(local(leaf).shape)}; expected {expected}, of which it has {tuple(self.local_shape(path))}: "
                    "params come from pipe.init or pipe.place of this pipeline, or one with the same mesh"
                )

    def check_fixed(self) -> None:
        """Refuse parameters that do not stay in place during a step, and stages that exchange values.

        Raises:
            AutofuncError: with the reason.
        """
        check_axes(self.is_sharded, self.partitioning is not WHOLE)

    # --- one step

    def reduction(self) -> Reduction:
        """Return an object that sums one step's gradients."""
        return Reduction(self.mesh, self.sharding.mp_policy.reduce_dtype, self.experts, self.model.canonical)

    def step(self, flat: Mapping[str, Tensor]) -> StepParameters:
        """Return the parameters of one step.

        Args:
            flat: canonical path -> leaf, of all parameters of this process.

        Raises:
            AutofuncError: if experts are spread over imagined ranks.
        """
        if self._is_imagined:
            raise AutofuncError(
                "sharding: expert_parallel needs a mesh; make one with af.make_mesh. Without one a pipeline can tell what "
                "a rank would keep (pipe.memory), but cannot run"
            )
        if self.is_sharded:
            return StepParameters(self, flat, self._storages.of(flat))
        return StepParameters(self, flat, None)

    @cached_property
    def _storages(self) -> Storages:
        assert self.mesh is not None
        mesh, device = self.mesh, torch.device(self.mesh.device_type)

        def blank(group: Group, like: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return self._parts(
                {path: torch.empty(like[path].shape, dtype=like[path].dtype, device=device) for path in group}
            )  # fmt: skip

        def mesh_of(group: Group) -> DeviceMesh:
            whole, axis = mesh, "dp_shard"
            if self.experts is not None and self.experts.mesh is not None and group[0] in self.experts.paths:
                whole, axis = self.experts.mesh, "edp"
            return whole["dp_replicate", axis] if axis_size(whole, "dp_replicate") > 1 else whole[axis]

        return Storages(lambda make: ShardedTree(self.groups, make, mesh_of, self.sharding), blank)

    def _parts(self, full: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cut each process's part from a group's whole parameters, over the axis that computes with different parts."""
        if self.experts is not None and not self.experts.paths.isdisjoint(full):
            return self.experts.over_ranks(full)
        return self._over_tp(full)

    def _over_tp(self, full: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cut each process's part from whole parameters; all have the same ones, so nothing is sent."""
        if self.mesh is None or axis_size(self.mesh, "tp") == 1:
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

"""A pipeline: stages and a schedule, built for the batches it has seen. It holds no parameters."""

from __future__ import annotations

import itertools
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from autofunc import tree
from autofunc.batch import Microbatch, split_batch
from autofunc.engine import EngineOptions, require_compiler
from autofunc.errors import AutofuncError, BatchError, MeshError, ScheduleError, SplitError
from autofunc.explain import explain
from autofunc.losses import Loss
from autofunc.mesh import pp_ranks
from autofunc.runtime.buffers import SlotPool
from autofunc.runtime.gather import gather_tree
from autofunc.runtime.measure import Scales, Watch, measured_timeline, of_all
from autofunc.runtime.observe import Trace
from autofunc.runtime.plan import Mode, Plan, build_plan
from autofunc.runtime.step import Observe, StepResult, run_step
from autofunc.runtime.transport import DistributedTransport
from autofunc.schedule import Costs, Schedule, StageBytes, Timeline, costs_of, validate
from autofunc.splitting import Stage

_MOST_PLANS = 64  # batch signatures a pipeline remembers; beyond that the oldest is forgotten


class Pipeline:
    """A pipelined function of (params, batch); made by `af.pipeline`.

    It holds no parameters and no state of training, only what was built for the batch signatures it has seen.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        schedule: Schedule,
        loss: Loss | None,
        mesh: DeviceMesh | None,
        options: EngineOptions,
        batch_dims: Mapping[str, int | None] | None,
        merge: bool = True,
    ) -> None:
        if len(stages) != schedule.num_stages:
            raise ScheduleError(
                f"schedule {schedule.name} with {schedule.num_ranks} ranks has {schedule.num_stages} stages, but the model "
                f"is split into {len(stages)}; use {schedule.num_stages - 1} split points, or another number of ranks"
            )
        if options.compile:
            require_compiler()
        _check_whole(stages)
        validate(schedule)
        self.stages = tuple(stages)
        self.schedule = schedule
        self.loss = loss
        self.mesh = mesh
        self.options = options
        self._batch_dims = batch_dims
        self._merge = merge
        self._ranks = pp_ranks(mesh) if mesh is not None else None
        if self._ranks is not None and len(self._ranks) != schedule.num_ranks:
            raise MeshError(
                f"the mesh has {len(self._ranks)} pp ranks, but schedule {schedule.name} was built for "
                f"{schedule.num_ranks}; they must be equal"
            )
        self.local_ranks = tuple(range(schedule.num_ranks)) if mesh is None else (mesh.get_local_rank("pp"),)
        self._local_stages = [stage for stage in stages if schedule.placement[stage.index] in self.local_ranks]
        self._paths = sorted({path for stage in self._local_stages for path in stage.paths}, key=tree.split_path)
        self._plans: dict[Any, tuple[Plan, DistributedTransport | None]] = {}
        self._calls = itertools.count(1)
        self._pools = {rank: SlotPool() for rank in self.local_ranks}
        self._trace: Observe | None = None
        if os.environ.get("AUTOFUNC_TRACE") == "1":
            self._trace = lambda plan, program, microbatches: [Trace(program)]

    def __repr__(self) -> str:
        return f"Pipeline({self.schedule}, {len(self.stages)} stages, engine={self.options.engine!r})"

    def init(self, seed: int = 0, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> TensorDict:
        """The initial parameters of this process's ranks: the same values in every layout."""
        return tree.to_tensordict(self.stages[0].model.init_paths(self._paths, seed, device, dtype))

    def place(self, full_params: tree.Nested) -> TensorDict:
        """A copy of this process's part of a full tree of parameters (or of any tree with the same paths).

        Raises:
            ModelError: when a path is missing.
        """
        flat = tree.flatten(full_params)
        return tree.to_tensordict({path: self.stages[0].model.lookup(flat, path).clone() for path in self._paths})

    def gather(self, params: tree.Nested) -> TensorDict:
        """A copy of the full tree, on every process, from each process's part of parameters or gradients.

        Every process calls it.
        """
        flat = tree.flatten(params)
        if self._group is None or self._ranks is None:
            return tree.to_tensordict({path: leaf.detach().clone() for path, leaf in flat.items()})
        return tree.to_tensordict(gather_tree(flat, self._ranks, self._group))

    def build(self, batch: Mapping[str, Any], params: tree.Nested | None = None, key: Any = None) -> Pipeline:
        """Build for batches with this signature ahead of the first call.

        Args:
            batch: an example; only shapes and dtypes matter.
            params: when they are not fp32 on the batch's device, this process's parameters, or tensors like them.
            key: anything but None when steps will have a key.
        """
        microbatches = self._split(batch, key)
        if params is None:
            flat = self.stages[0].model.init_paths(self._paths, 0, "meta", torch.float32)
            device = self._device(microbatches[0])
        else:
            flat = tree.flatten(params)
            device = self._device(flat)
        self._plan(Mode.GRADS, flat, device, microbatches)
        return self

    def explain(self) -> str:
        """What this pipeline does, as text: stages, parameters, what crosses between them, and the schedule drawn."""
        plans = [plan for plan, _ in self._plans.values()]
        return explain(self.stages, self.schedule, plans[0].boundaries if plans else None)

    def __call__(self, params: tree.Nested, batch: Mapping[str, Any], key: Any = None, *, has_aux: bool = False) -> Any:
        """The loss, forward only: 0-dim fp32, the same on every process; `(loss, aux)` with `has_aux`."""
        result = self.run(Mode.LOSS, params, batch, key)
        return (result.loss, given_aux(result)) if has_aux else result.loss

    def forward(self, params: tree.Nested, batch: Mapping[str, Any], key: Any = None, *, gather: str | None = None) -> Any:
        """The outputs of the last stage for all rows in order: on processes that hold it, elsewhere None.

        Args:
            params: this process's parameters.
            batch: a batch; labels are not needed.
            key: see `value_and_grad`.
            gather: "all" gives the outputs to every process.
        """
        if gather not in (None, "all"):
            raise AutofuncError(f'gather={gather!r}: expected None or "all"')
        return self.run(Mode.SHARED_OUTPUTS if gather == "all" else Mode.OUTPUTS, params, batch, key).outputs

    def profile(self, params: tree.Nested, batch: Mapping[str, Any], key: Any = None, *, steps: int = 5) -> Timeline:
        """Run some steps and tell when every action ran: the step of median length, in milliseconds.

        Every process calls it, and every process gets the timeline of all ranks. Ranks of one machine are timed by its
        clock, those of several from a barrier on. Ranks of one process take turns, so of those only lengths count.

        Args:
            params: this process's parameters.
            batch: a batch.
            key: see `value_and_grad`.
            steps: how many to measure, after one that is not.

        Example:
            timeline = pipe.profile(params, batch)
            predicted = af.schedule.simulate(timeline.schedule, pipe.costs(params, batch))
            af.schedule.draw([predicted, timeline], "profile.html")
        """

        def run_once(watch: Watch) -> None:
            self.run(Mode.GRADS, params, batch, key, watch)

        return measured_timeline(run_once, self._group, steps)

    def costs(self, params: tree.Nested, batch: Mapping[str, Any], key: Any = None, *, steps: int = 5) -> Costs:
        """What the stages cost, in milliseconds: for `schedule.simulate` and `schedule.search`.

        Measured in a run of this schedule with every backward split into I and W. The first stage, which needs no input
        gradient, has almost nothing as I and its whole backward as W. Every process calls it. Arguments as of `profile`.
        """
        found = costs_of(self._with_split_backward.profile(params, batch, key, steps=steps))
        return replace(found, comm=0.0) if self.mesh is None else found  # in one process nothing is transferred

    @cached_property
    def _with_split_backward(self) -> Pipeline:
        """This pipeline with I and W everywhere, built once."""
        split = self.schedule.split_form()
        return Pipeline(self.stages, split, self.loss, self.mesh, self.options, self._batch_dims, merge=False)

    def memory(self, params: tree.Nested, batch: Mapping[str, Any], key: Any = None) -> tuple[StageBytes, ...]:
        """What each stage keeps for one microbatch, in bytes: known from its graph, nothing is run.

        For `schedule.live_bytes` and, as `schedule.Memory.of_stages(...)`, for `schedule.search`. Every process calls it.

        Raises:
            AutofuncError: for the eager engine, which cannot tell, and where a size depends on data.
        """
        functions = self._prepare(Mode.GRADS, params, batch, key)[0].functions
        if not all(stage.exact_bytes for stage in functions.values()):
            raise AutofuncError(
                "what this pipeline keeps is not known before it runs: "
                + ("a size depends on data" if self.options.engine == "graph" else 'use engine="graph"')
            )
        known = of_all({index: stage.bytes for index, stage in functions.items()}, self._group)
        return tuple(known[stage.index] for stage in self.stages)

    def measure_bytes(self, params: tree.Nested, batch: Mapping[str, Any], key: Any = None) -> tuple[list[int], ...]:
        """Run a step and weigh what is alive after each action of the lowered schedule, by rank.

        Distinct storages of residuals, boundary values, cotangents, receive slots and accumulators are counted; parameters,
        the batch and an operator's temporaries are not. Every process calls it.
        """
        scales = Scales([leaf for leaf in tree.flatten(params).values() if isinstance(leaf, Tensor)])
        self.run(Mode.GRADS, params, batch, key, scales)
        alive = of_all({rank: scale.alive for rank, scale in scales.ranks.items()}, self._group)
        return tuple(alive[rank] for rank in range(self.schedule.num_ranks))

    def run(
        self, mode: Mode, params: tree.Nested, batch: Mapping[str, Any], key: Any, observe: Observe | None = None
    ) -> StepResult:
        """Run one step. `af.value_and_grad`, `pipe(...)` and `pipe.forward` are this with a mode."""
        plan, transport, flat, microbatches = self._prepare(mode, params, batch, key)
        with torch.no_grad():
            return run_step(plan, flat, microbatches, transport, next(self._calls), observe or self._trace)

    @property
    def _group(self) -> ProcessGroup | None:
        return self.mesh.get_group("pp") if self.mesh is not None else None

    def _prepare(
        self, mode: Mode, params: tree.Nested, batch: Mapping[str, Any], key: Any
    ) -> tuple[Plan, DistributedTransport | None, dict[str, Tensor], list[Microbatch]]:
        flat = tree.flatten(params)
        microbatches = self._split(batch, key)
        return (*self._plan(mode, flat, self._device(flat), microbatches), flat, microbatches)

    def _device(self, leaves: Mapping[str, Any]) -> torch.device:
        """The device of the first tensor; where there is none, the mesh's, or the CPU."""
        for leaf in tree.leaves_and_spec(leaves)[0]:
            if isinstance(leaf, Tensor) and not leaf.is_meta:
                return leaf.device
        if self.mesh is None or self.mesh.device_type == "cpu":
            return torch.device("cpu")
        return torch.device(self.mesh.device_type, torch.accelerator.current_device_index())

    def _split(self, batch: Mapping[str, Any], key: Any) -> list[Microbatch]:
        return split_batch(batch, self.schedule.num_microbatches, key=key, batch_dims=self._batch_dims)

    def _plan(
        self, mode: Mode, params: Mapping[str, Tensor], device: torch.device, microbatches: Sequence[Microbatch]
    ) -> tuple[Plan, DistributedTransport | None]:
        described = tuple((path, params[path].shape, params[path].dtype) for path in sorted(params))
        key = (mode, _signature(microbatches[0]), described, device)
        if key not in self._plans:
            if len(self._plans) >= _MOST_PLANS:
                self._plans.pop(next(iter(self._plans)))
            for path in self._paths:
                self.stages[0].model.lookup(params, path)
            plan = build_plan(
                mode,
                self.stages,
                self.schedule,
                self.loss,
                self.options,
                params,
                device,
                microbatches[0],
                self._pools,
                self._merge,
            )
            transport = None
            if self._group is not None and self._ranks is not None:
                transport = DistributedTransport(self._group, self._ranks, self.local_ranks[0], plan.device, plan.channels)
            self._plans[key] = (plan, transport)
        return self._plans[key]


def _signature(microbatch: Microbatch) -> Any:
    """What a plan depends on: shapes, dtypes and devices of tensors, and the values of everything else.

    Raises:
        BatchError: for a leaf that cannot be compared by value, such as a numpy array.
    """
    leaves, spec = tree.leaves_and_spec(microbatch)
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, Hashable)):
            raise BatchError(
                f"the batch holds a {type(leaf).__name__}; expected tensors (torch.from_numpy) or plain values"
            )
    return spec, tuple((leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves)


def _check_whole(stages: Sequence[Stage]) -> None:
    """Refuse stages that are not all the stages of one model, in order."""
    model = stages[0].model
    layers = [name for stage in stages for name in stage.layers]
    ordered = all(stage.index == index and stage.model is model for index, stage in enumerate(stages))
    if not ordered or layers != list(model.layers):
        raise SplitError(
            f"the stages run the layers {', '.join(layers)}, but the model has {', '.join(model.layers)}; pass all that "
            "one call of af.split returned, in order"
        )


def given_aux(result: StepResult) -> Any:
    """The aux of a step whose caller wants it."""
    if result.aux is None:
        raise BatchError("has_aux=True, but the loss returns no aux; return (sum, weight, aux) from it")
    return result.aux

"""A pipeline: stages and a schedule, built for the batches it has seen. It holds no parameters."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from autofunc import tree
from autofunc.batch import Microbatch, split_any_rows, split_batch
from autofunc.compatible import check_compatible
from autofunc.counted_rows import weighed
from autofunc.engine import EngineOptions, require_compiler
from autofunc.errors import AutofuncError
from autofunc.explain import explain
from autofunc.held import Held
from autofunc.losses import Loss
from autofunc.mesh import data_coordinate
from autofunc.row_dims import BatchDims
from autofunc.runtime.buffers import SlotPool
from autofunc.runtime.cuda_graphs import require_graphs
from autofunc.runtime.debug import observe_as
from autofunc.runtime.finish import may_weigh_nothing
from autofunc.runtime.measure import Scales, Watch, measured_timeline, of_all
from autofunc.runtime.not_finite import FiniteNotes, raise_first, unfit_parameters
from autofunc.runtime.pair_groups import Transfers
from autofunc.runtime.parts import check_same_parts, counted, joined
from autofunc.runtime.plan import Blueprint, Mode
from autofunc.runtime.plans import Plans
from autofunc.runtime.position import here
from autofunc.runtime.step import Observe, StepResult, given_aux, run_step
from autofunc.runtime.weight_check import WeightCheck
from autofunc.schedule import Costs, Schedule, StageBytes, Timeline, costs_of
from autofunc.shard import Sharding
from autofunc.shard.dtensors import local
from autofunc.shard.parameters import Parameters
from autofunc.splitting import Stage


class Pipeline(Held):
    """A pipelined function of (params, batch); made by `af.pipeline`.

    It holds no parameters and no training state, only what was built for the batch signatures it has seen.

    Example:
        pipe = af.pipeline(stages, af.schedule.build("1f1b", num_ranks=2, num_microbatches=8), loss=af.losses.causal_lm)
        params = pipe.init(seed=0)
        loss, grads = af.value_and_grad(pipe)(params, batch, key=(0, step))
        validation_loss = pipe(params, validation_batch)  # forward only
        print(pipe.explain())
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        schedule: Schedule,
        loss: Loss | None,
        mesh: DeviceMesh | None,
        options: EngineOptions,
        batch_dims: BatchDims,
        sharding: Sharding,
        transfers: Transfers,
        merge: bool = True,
        parameters: Parameters | None = None,
    ) -> None:
        check_compatible(stages, schedule, mesh)
        if options.compiles:
            require_compiler()
        if options.records:
            require_graphs(mesh)
        super().__init__(stages, schedule, mesh, sharding, parameters)
        if options.records:
            self._parameters.check_fixed()
        self.loss = loss
        self.options = options
        self._batch_dims = batch_dims
        self.transfers = transfers
        self._step_number = 0  # of the last step
        self._weight_check = WeightCheck()
        pools = {rank: SlotPool() for rank in self.local_ranks}
        self._blueprint = Blueprint(
            self.stages, schedule, loss, options, self._parameters, pools, merge, transfers.sends_block
        )
        self._plans = Plans(self._blueprint, self._group, self._ranks, transfers)
        self._observe = observe_as(os.environ)

    def __repr__(self) -> str:
        return f"Pipeline({self.schedule}, {len(self.stages)} stages, engine={self.options.engine!r})"

    @torch.inference_mode(False)
    def build(self, batch: Mapping[str, Any], params: tree.Nested | None = None, key: Any = None) -> Pipeline:
        """Build for batches with this signature before the first call; return the pipeline.

        Args:
            batch: an example; only shapes and dtypes matter.
            params: this process's parameters, or tensors like them; by default fp32 on the batch's device.
            key: anything but None if steps will have a key.

        Raises:
            BatchError: for a batch that cannot be split into the schedule's microbatches.
            ModelError: if a stage cannot be captured or compiled.
        """
        microbatches = self._split(batch, key)
        flat = self._model.init_paths(self._parameters.paths, 0, "meta") if params is None else tree.flatten(params)
        self._plans.of(Mode.GRADS, flat, self._device(microbatches[0] if params is None else flat), microbatches)
        return self

    def close(self) -> None:
        """Free what was built: graphs, memory, and connections between pp ranks that no other pipeline uses.

        Every process calls it, before `torch.distributed.destroy_process_group`. A later call of the pipeline rebuilds
        it.
        """
        for variant in ("_with_split_backward", "_by_rows"):
            if variant in self.__dict__:
                self.__dict__.pop(variant).close()
        self._plans.close()

    def explain(self) -> str:
        """Describe the pipeline as text: stages, parameters, values between stages, and the schedule drawn."""
        first = next(iter(self._plans), None)
        return explain(self.stages, self.schedule, None if first is None else first.boundaries)

    def __call__(
        self,
        params: tree.Nested,
        batch: Mapping[str, Any],
        key: Any = None,
        *,
        state: tree.Nested | None = None,
        has_aux: bool = False,
    ) -> Any:
        """Return the loss, forward only: 0-dim fp32, the same on every process; `(loss, aux)` with `has_aux`.

        A batch may have any number of rows, the same on all data parallel ranks; microbatches are weighted by their rows.
        Layers with state, such as batch normalisation, are evaluated with the given `state`, which is not changed.
        """
        result = self.run(Mode.LOSS, params, batch, key, state)
        return (result.loss, given_aux(result)) if has_aux else result.loss

    def forward(
        self, params: tree.Nested, batch: Mapping[str, Any], key: Any = None, *, state: tree.Nested | None = None,
        gather: str | None = None,
    ) -> Any:  # fmt: skip
        """Return the outputs of the last stage for all rows, in order; None on processes that do not hold it.

        Args:
            params: this process's parameters.
            batch: of any number of rows; labels are not needed.
            key: see `value_and_grad`.
            state: of layers that keep state, as for `pipe(...)`.
            gather: "all" returns the outputs on every process.

        Raises:
            AutofuncError: for an unknown `gather`.
        """
        if gather not in (None, "all"):
            raise AutofuncError(f'gather={gather!r}: expected None or "all"')
        return self.run(Mode.SHARED_OUTPUTS if gather == "all" else Mode.OUTPUTS, params, batch, key, state).outputs

    @torch.inference_mode(False)
    def advance(
        self, params: tree.Nested, batch: Mapping[str, Any], states: Sequence[tree.Nested], key: Any = None
    ) -> tuple[Any, list[TensorDict]]:
        """Return outputs as `forward` does, and the new state of each microbatch, such as a cache of its rows.

        Args:
            params: this process's parameters.
            batch: with rows for as many equal microbatches as there are states.
            states: of this process's layers, per microbatch; they are donated, and the returned states may use
                their memory.
            key: see `value_and_grad`.
        """
        given = [self._checked(state) for state in states]
        result = self._step(Mode.ADVANCE, params, self._split(batch, key, len(given)), given)
        return result.outputs, [tree.to_tensordict(state) for state in result.states]

    def profile(self, params: tree.Nested, batch: Mapping[str, Any], key: Any = None, *, steps: int = 5) -> Timeline:
        """Run steps and return when every action ran: the timeline of the step of median length, in milliseconds.

        Every process calls it, and every process gets the timeline of all ranks. Ranks of one machine share its clock,
        clocks of several start at a barrier. Ranks of one process alternate, so only their durations are meaningful.

        Args:
            params: this process's parameters.
            batch: the batch of every step.
            key: see `value_and_grad`.
            steps: how many to measure, after a warm-up step.

        Example:
            timeline = pipe.profile(params, batch)
            predicted = af.schedule.simulate(timeline.schedule, pipe.costs(params, batch))
            af.schedule.draw([predicted, timeline], "profile.html")
        """

        def run_once(watch: Watch) -> None:
            self.run(Mode.GRADS, params, batch, key, self._state_beside(params), watch)

        return measured_timeline(run_once, self._group, self._device(tree.flatten(params)), steps)

    def costs(self, params: tree.Nested, batch: Mapping[str, Any], key: Any = None, *, steps: int = 5) -> Costs:
        """Measure what the stages cost, in milliseconds, for `schedule.simulate` and `schedule.search`.

        Runs this schedule with every backward split into `I` and W. The first stage, which needs no input
        gradient, has almost no `I` and its whole backward as W. Every process calls it. Arguments as for `profile`.
        """
        found = costs_of(self._with_split_backward.profile(params, batch, key, steps=steps))
        # in one process nothing is transferred
        return replace(found, comm=0.0, send=0.0, receive=0.0) if self.mesh is None else found

    @cached_property
    def _with_split_backward(self) -> Pipeline:
        """This pipeline with every backward split into `I` and W, built once."""
        return self._variant(self.schedule.split_form(), self.loss, merge=False)

    def with_loss(self, loss: Loss | None) -> Pipeline:
        """Return this pipeline with another loss, for the same parameters, such as to evaluate another metric."""
        return self._variant(self.schedule, loss, self._blueprint.merge)

    def _variant(self, schedule: Schedule, loss: Loss | None, merge: bool) -> Pipeline:
        return Pipeline(
            self.stages, schedule, loss, self.mesh, self.options, self._batch_dims, self.sharding, self.transfers, merge,
            self._parameters,
        )  # fmt: skip

    @torch.inference_mode(False)
    def memory(self, params: tree.Nested, batch: Mapping[str, Any], key: Any = None) -> tuple[StageBytes, ...]:
        """Return what each stage keeps for one microbatch, in bytes, from its graph; nothing runs.

        For `schedule.live_bytes` and, as `schedule.Memory.of_stages(...)`, for `schedule.search`. Every process calls it.
        For the arguments see `profile`.

        Raises:
            AutofuncError: for the eager engine, which cannot tell, or if a size depends on data.
        """
        flat = tree.flatten(params)
        functions = self._plans.of(Mode.GRADS, flat, self._device(flat), self._split(batch, key))[0].functions
        if not all(stage.exact_bytes for stage in functions.values()):
            raise AutofuncError(
                "this pipeline's memory is not known before it runs: "
                + ("a size depends on data" if self.options.engine == "graph" else 'use engine="graph"')
            )
        known = of_all({index: stage.bytes for index, stage in functions.items()}, self._group)
        return tuple(known[stage.index] for stage in self.stages)

    def measure_bytes(self, params: tree.Nested, batch: Mapping[str, Any], key: Any = None) -> tuple[list[int], ...]:
        """Run a step and measure the bytes alive after each action of the lowered schedule, by rank.

        Counts the distinct storages of residuals, boundary values, cotangents, receive slots and accumulators, but not
        parameters, the batch or temporaries of operators. Every process calls it. For the arguments see `profile`.
        """
        scales = Scales([local(leaf) for leaf in tree.flatten(params).values() if isinstance(leaf, Tensor)])
        self.run(Mode.GRADS, params, batch, key, self._state_beside(params), scales)
        alive = of_all({rank: scale.alive for rank, scale in scales.ranks.items()}, self._group)
        return tuple(alive[rank] for rank in range(self.schedule.num_ranks))

    def reserved_bytes(self) -> int:
        """Return the bytes of this process's receive slots, which are kept between steps."""
        return sum(pool.num_bytes for pool in self._blueprint.pools.values())

    def check_finite(
        self, params: tree.Nested, batch: Mapping[str, Any], key: Any = None, state: tree.Nested | None = None
    ) -> None:
        """Rerun a step whose loss or gradients are not finite, and report where that begins.

        Every process calls it, with the arguments of `value_and_grad`, and raises the same error. With `AUTOFUNC_DEBUG=nan`
        in the environment all steps are checked, at the price of waiting for each action.

        Raises:
            NotFiniteError: with rank, step, stage, microbatch, layer, and whether it is the forward, an input gradient
                or a parameter's gradient: the first place on any process. No error if all is finite.
        """
        raise_first(unfit_parameters({path: local(leaf) for path, leaf in tree.flatten(params).items()}), self.mesh)
        given, notes = self._state_beside(params) if state is None else state, FiniteNotes()
        self.run(Mode.GRADS, params, batch, key, given, notes, again=self._step_number > 0)
        raise_first(notes.found.values(), self.mesh)

    @torch.inference_mode(False)
    def run(
        self, mode: Mode, params: tree.Nested, batch: Mapping[str, Any], key: Any, state: tree.Nested | None = None,
        observe: Observe | None = None, again: bool = False,
    ) -> StepResult:  # fmt: skip
        """Run one step, or rerun the last. `af.value_and_grad`, `pipe(...)` and `pipe.forward` call this with a mode.

        Without gradients any number of rows is valid. Leftover rows run as a separate step, with less weight.
        """
        given = [self._checked(state)]
        if mode is Mode.GRADS:
            return self._checked_weight(self._step(mode, params, self._split(batch, key), given, observe, again))
        parts = split_any_rows(
            batch, self.schedule.num_microbatches, key=key, batch_dims=self._batch_dims, place=data_coordinate(self.mesh),
            key_name=self._model.key_name,
        )  # fmt: skip
        device = self._device(tree.flatten(params))
        check_same_parts(self.mesh, parts, device)
        results = [self._step(mode, params, parts.whole, given, observe, again)]
        if parts.rest:
            pipe, rest = (self._by_rows, counted(parts, device)) if mode is Mode.LOSS else (self, parts.rest)
            results.append(pipe._step(mode, params, rest, given, observe, again))
        return self._checked_weight(joined(results, self.loss, (len(parts.whole), parts.share)))

    def _checked_weight(self, result: StepResult) -> StepResult:
        if result.weight is not None and not may_weigh_nothing(self.loss):
            self._weight_check.add(self._step_number, result.weight)
        self._weight_check.raise_if_nothing_weighed()
        return result

    @cached_property
    def _by_rows(self) -> Pipeline:
        """This pipeline with a loss that weights rows as the batch asks, built once."""
        return self.with_loss(weighed(self.loss, 1))

    def _step(
        self, mode: Mode, params: tree.Nested, microbatches: Sequence[Microbatch], states: Sequence[Mapping[str, Tensor]],
        observe: Observe | None = None, again: bool = False,
    ) -> StepResult:  # fmt: skip
        flat = tree.flatten(params)
        plan, transport = self._plans.of(mode, flat, self._device(flat), microbatches)
        self._step_number += not again
        here.begin(self._step_number, self._ranks)
        with torch.no_grad():
            result = run_step(plan, flat, microbatches, states, transport, self._step_number, observe or self._observe)
        here.end(self._step_number)
        return result

    def _state_beside(self, params: tree.Nested) -> TensorDict:
        """Make a state for measured steps, on the parameters' device; its values do not affect costs."""
        return self.init_state(self._device(tree.flatten(params)))

    def _split(self, batch: Mapping[str, Any], key: Any, into: int | None = None) -> list[Microbatch]:
        (place, _), count = data_coordinate(self.mesh), into or self.schedule.num_microbatches
        return split_batch(
            batch, count, key=key, batch_dims=self._batch_dims, first=place * count, key_name=self._model.key_name
        )

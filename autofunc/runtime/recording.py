"""Recorded steps: they read from fixed memory, and their results are copied out of it.

The first step of a plan runs normally, which settles kernels, workspaces and layouts; the second is recorded
on tape. A tape reads fixed memory: the batch and the state are copied there for each step. Parameters are read where the
caller keeps them, as long as they stay there, as with an optimizer that updates in place. The first time that
they have moved, the pipeline makes its own copy, records again, and copies them there from then on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autofunc import tree
from autofunc.engine import Microbatch
from autofunc.engine.recordable import INSTEAD, check_tensors
from autofunc.errors import AutofuncError, PipelineRunError, in_brief
from autofunc.runtime.accumulate import HeldAccumulator
from autofunc.runtime.cuda_graphs import KINDS, Graphs
from autofunc.runtime.executor import Observer, RankStep, run_rank, run_together
from autofunc.runtime.fixed import Fixed, copy_all
from autofunc.runtime.program import Layout
from autofunc.runtime.states import states_of
from autofunc.runtime.tape import Tape, TapedPort
from autofunc.runtime.transport import MemoryHub, MemoryTransport, Transport
from autofunc.shard.dtensors import local
from autofunc.shard.reduce import Reduction
from autofunc.shard.step_parameters import StepParameters

if TYPE_CHECKING:
    from autofunc.runtime.plan import Plan

LOG = logging.getLogger("autofunc.graphs")
"""Logs what was recorded, and how long it took."""


class GraphMemory:
    """Memory that the recordings of a pipeline's plans share, since steps run one after the other."""

    def __init__(self) -> None:
        self.owns_parameters = False  # the caller's parameters have moved once
        self._graphs: dict[int, Graphs] = {}
        self._parameters: dict[str, Tensor] = {}
        self._sums: dict[Any, list[Tensor]] = {}

    def graphs(self, device: torch.device, tape: int = 0) -> Graphs:
        """Return the maker of graphs for a device: one per tape, with its own pool, as tapes are played alternately."""
        if tape not in self._graphs:
            self._graphs[tape] = KINDS[device.type](device)
        return self._graphs[tape]

    def parameter(self, path: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return memory for a parameter, in the dtype that stages compute with."""
        known = self._parameters.get(path)
        if known is None or (known.shape, known.stride(), known.dtype) != (like.shape, like.stride(), dtype):
            self._parameters[path] = torch.empty_like(like, dtype=dtype)
        return self._parameters[path]

    def sums(self, stage: int, layouts: Sequence[Layout], device: torch.device) -> list[Tensor]:
        """Return memory for the sums of a stage's weight gradients."""
        key = stage, tuple(layouts)
        if key not in self._sums:
            self._sums[key] = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in layouts]
        return self._sums[key]

    def clear(self) -> None:
        """Free all memory."""
        self._graphs, self._parameters, self._sums = {}, {}, {}


class _LateReduction:
    """Stands in for the reduction of whichever step plays the tape."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self.current: Reduction | None = None

    def post(self, sums: Mapping[str, Tensor]) -> None:
        """See `Reduction.post`."""
        self._tape.outside(lambda: self._post(sums))

    def _post(self, sums: Mapping[str, Tensor]) -> None:
        assert self.current is not None, "a tape is played within a step"
        self.current.post(sums)


@dataclass
class _Taped:
    """One rank's recorded step."""

    step: RankStep
    tape: Tape | None  # None: the first rank of the process plays for all
    ports: Sequence[TapedPort]
    reduction: _LateReduction


class Recording:
    """A plan's step on tape.

    Args:
        plan: the plan.
        flat: parameters of the step that is recorded.
        microbatches: its microbatches.
        state: its state.
        memory: of the pipeline.
        number: of the step, for messages.
        cut: do not capture transfers: they go to other processes.
        apart: make each action a separate part.

    Raises:
        AutofuncError: if a recording cannot read the batch, or an action cannot be captured.
    """

    def __init__(
        self, plan: Plan, flat: Mapping[str, Tensor], microbatches: Sequence[Microbatch], state: Mapping[str, Tensor],
        memory: GraphMemory, number: int, *, cut: bool, apart: bool,
    ) -> None:  # fmt: skip
        self._plan, self._memory, self._number, began = plan, memory, number, time.perf_counter()
        for microbatch in microbatches:
            names, leaves = tree.leaf_names(dict(microbatch.entries), ""), tree.leaves_and_spec(dict(microbatch.entries))[0]
            pairs = zip(names, leaves, strict=True)
            check_tensors(((name, leaf) for name, leaf in pairs if isinstance(leaf, Tensor)), plan.device)
        memory.graphs(plan.device).make_room()
        self._batch = [Fixed(microbatch.tensors) for microbatch in microbatches]
        self._state = Fixed(list(state.values()))
        self._entries = [_with(mb, fixed.tensors) for mb, fixed in zip(microbatches, self._batch, strict=True)]
        self._fixed_state = dict(zip(state, self._state.tensors, strict=True))
        self._leaves, self._own = self._parameters(flat)
        self._slots = self._current_slots()
        self._sums = {
            index: memory.sums(index, layouts, plan.device) for index, layouts in plan.layouts.items() if layouts
        }  # fmt: skip
        self.fill(flat, microbatches, state)
        self._taped: dict[int, _Taped] = {}
        self._record(cut, apart)
        graphs = sum(taped.tape.num_graphs for taped in self._taped.values() if taped.tape is not None)
        LOG.info("recorded a step as %d graphs in %.1f s", graphs, time.perf_counter() - began)

    def fill(self, flat: Mapping[str, Tensor], microbatches: Sequence[Microbatch], state: Mapping[str, Tensor]) -> bool:
        """Copy a step's arguments to where the tape reads them; return False if it can no longer be played.

        That happens if parameters or receive slots have moved from where the tape reads them.
        """
        leaves = {path: local(flat[path]).detach() for path in self._leaves}
        moved = [path for path, leaf in leaves.items() if self._leaves[path].data_ptr() != leaf.data_ptr()]
        if not self._own.issuperset(moved):
            self._memory.owns_parameters = True
            return False
        if any(now is not then for now, then in zip(self._current_slots().values(), self._slots.values(), strict=True)):
            return False
        if self._own:
            own = sorted(self._own)
            copy_all([leaves[path] for path in own], [self._leaves[path] for path in own])
        for fixed, microbatch in zip(self._batch, microbatches, strict=True):
            fixed.fill(microbatch.tensors)
        self._state.fill([state[path] for path in self._fixed_state])
        return True

    def run(
        self,
        rank: int,
        transport: Transport,
        reduction: Reduction,
        number: int,
        observers: Mapping[int, Sequence[Observer]],
    ) -> Iterator[None]:
        """Run a rank's part of a step; yield each time it has to wait. `step` has the results."""
        taped = self._taped[rank]
        taped.reduction.current = reduction
        for port, channel in zip(taped.ports, taped.step.program.channels, strict=False):
            port.current = transport.open(channel)
        if taped.tape is not None:
            try:
                yield from taped.tape.play(observers)
            except AutofuncError as error:
                error.add_note(f"at rank {rank}, step {number}, which is recorded")
                raise

    def step(self, rank: int, reduction: Reduction) -> RankStep:
        """Return the results of a rank's part. Sums lie in memory that the next step uses; all else is copied."""
        taken = self._taped[rank].step
        produced = {index: made._replace(aux=tree.map_leaves(_copied, made.aux)) for index, made in taken.produced.items()}
        return replace(
            taken,
            reduction=reduction,
            accumulators={index: HeldAccumulator(self._sums.get(index, []), zeroed=True) for index in taken.stages},
            states={key: [*map(_copied, leaves)] for key, leaves in taken.states.items()},
            produced=produced,
        )

    def _record(self, cut: bool, apart: bool) -> None:
        plan = self._plan
        hub, ranks = MemoryHub(plan.schedule.num_ranks), list(plan.programs)
        together = [[rank] for rank in ranks] if cut else [ranks]  # the ranks of each tape
        for number, on_tape in enumerate(together):
            graphs = self._memory.graphs(plan.device, number)
            with graphs.capturing():
                tape = Tape(graphs.new, cut=cut, apart=apart)
                for rank in on_tape:
                    transport = None if cut else MemoryTransport(hub, rank)
                    self._taped[rank] = self._taped_rank(rank, tape, rank == on_tape[0], transport)
                try:
                    run_together([run_rank(self._taped[rank].step) for rank in on_tape], hub)
                    tape.end()
                except Exception as error:
                    tape.abandon()
                    what = str(error).partition("\n")[0] if isinstance(error, PipelineRunError) else in_brief(error)
                    raise AutofuncError(f'compile="graphs": a step cannot be recorded: {what}; {INSTEAD}') from error

    def _taped_rank(self, rank: int, tape: Tape, plays: bool, transport: MemoryTransport | None) -> _Taped:
        plan, program = self._plan, self._plan.programs[rank]
        stages = [plan.stages[index] for index in plan.schedule.stages_of(rank)]
        reduction = _LateReduction(tape)
        ports = [TapedPort(tape) for _ in program.channels] if transport is None else []
        step = RankStep(
            program=program,
            functions=plan.functions,
            stages={stage.index: stage for stage in stages},
            parameters=StepParameters(plan.parameters, self._leaves, None),
            reduction=reduction,  # type: ignore[arg-type]
            accumulators={stage.index: HeldAccumulator(self._sums.get(stage.index, [])) for stage in stages},
            microbatches=self._entries,
            ports=ports if transport is None else [transport.open(channel) for channel in program.channels],
            slots=self._slots[rank],
            number=self._number,
            states=states_of(stages, [self._fixed_state]),
            observers=[tape],
            lasting=True,
        )
        return _Taped(step, tape if plays else None, ports, reduction)

    def _parameters(self, flat: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
        """Return what stages read, by path, and the paths that lie in the pipeline's own memory."""
        precision, found, own = self._plan.parameters.sharding.precision, {}, set()
        for path in self._plan.parameters.paths:
            leaf = local(flat[path]).detach()
            dtype = precision.parameter_dtype(leaf.dtype)
            if self._memory.owns_parameters or dtype != leaf.dtype:
                own.add(path)
                leaf = self._memory.parameter(path, leaf, dtype)
            found[path] = leaf
        return found, own

    def _current_slots(self) -> dict[int, list[Tensor]]:
        plan = self._plan
        return {rank: plan.pools[rank].tensors(program.slots, plan.device) for rank, program in plan.programs.items()}


class Recordings:
    """The recordings of one plan: one of its steps, and one in which each action can be timed.

    Args:
        memory: of the pipeline.
    """

    def __init__(self, memory: GraphMemory) -> None:
        self.cuts = False  # do not capture transfers between ranks of this process either
        self._memory = memory
        self._made: dict[bool, Recording] = {}
        self._has_run = False

    def of(
        self, plan: Plan, flat: Mapping[str, Tensor], microbatches: Sequence[Microbatch], state: Mapping[str, Tensor],
        number: int, *, cut: bool, apart: bool,
    ) -> Recording | None:  # fmt: skip
        """Return the recording of a step, filled with its arguments; None for the first step, which runs without.

        Args:
            plan: their plan.
            flat: flat parameters of the step.
            microbatches: of the step.
            state: of the step.
            number: of the step.
            cut: see `Recording`.
            apart: see `Recording`.
        """
        if not self._has_run:
            self._has_run = True
            return None
        known = self._made.get(apart)
        if known is None or not known.fill(flat, microbatches, state):
            known = None
            self._made.pop(apart, None)  # the next one needs its memory
            cut = cut or self.cuts
            known = Recording(plan, flat, microbatches, state, self._memory, number, cut=cut, apart=apart)
            self._made[apart] = known
        return known


def _with(microbatch: Microbatch, tensors: Sequence[Tensor]) -> Microbatch:
    """Replace the tensors of a microbatch."""
    leaves, spec = tree.leaves_and_spec(dict(microbatch.entries))
    left = iter(tensors)
    return Microbatch.of(tree.from_leaves([next(left) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec))


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf

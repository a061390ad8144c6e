"""Run one step of a plan: on this process's rank, or on all ranks alternately if they share the process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autofunc import tree
from autofunc.engine import Microbatch, Produced
from autofunc.errors import BatchError
from autofunc.losses import combine_aux
from autofunc.mesh import DATA_AXES, data_coordinate, gather_over, sum_over
from autofunc.runtime.accumulate import Accumulator
from autofunc.runtime.executor import Observer, RankStep, run_rank, run_together
from autofunc.runtime.finish import divide, divisor, exchange_ties, mean, share, total_loss
from autofunc.runtime.plan import Mode, Plan
from autofunc.runtime.position import here
from autofunc.runtime.program import Program
from autofunc.runtime.recording import Recording
from autofunc.runtime.states import flat_lanes, flat_states, states_of
from autofunc.runtime.transport import DistributedTransport, MemoryHub, MemoryTransport, Transport
from autofunc.shard.dtensors import like
from autofunc.shard.reduce import Reduction


@dataclass
class StepResult:
    """The results of a step on this process."""

    loss: Tensor | None = None  # total / weight; all three are 0-dim fp32, the same on every rank
    total: Tensor | None = None  # sum of the microbatches' losses
    weight: Tensor | None = None  # sum of their weights
    aux: Any = None
    grads: dict[str, Tensor] = field(default_factory=dict)  # canonical path -> gradient
    state: dict[str, Tensor] = field(default_factory=dict)  # path -> new state of layers
    states: list[dict[str, Tensor]] = field(default_factory=list)  # new state by microbatch, see `Mode.ADVANCE`
    outputs: Any = None  # on the rank that holds the last stage


def given_aux(result: StepResult) -> Any:
    """Return the aux of a step.

    Raises:
        BatchError: if the loss returns none.
    """
    if result.aux is None:
        raise BatchError("has_aux=True, but the loss returns no aux; return (sum, weight, aux) from it")
    return result.aux


Observe = Callable[[Plan, Program, Sequence[Microbatch]], Sequence[Observer]]
"""Makes the observers of one rank's step. Called once for every local rank, before the rank's first op, with the
plan, the rank's program and all microbatches of the step."""


class OneByOne:
    """Base of an `Observe` that needs actions one at a time: no pairs are interleaved. All processes use it."""


class Timer:
    """Base of an `Observe` whose observers look at no values, so that they can observe recorded steps too."""


def run_step(
    plan: Plan,
    params: Mapping[str, Tensor],
    microbatches: Sequence[Mapping[str, Any]],
    states: Sequence[Mapping[str, Tensor]],
    transport: DistributedTransport | None,
    number: int,
    observe: Observe | None = None,
) -> StepResult:
    """Run the plan's programs.

    Args:
        plan: what to run.
        params: flat canonical parameters of the local ranks.
        microbatches: all microbatches of the step.
        states: flat state of the local ranks: one that microbatches pass on, or one per microbatch, see `Mode.ADVANCE`.
        transport: to the other processes; None if all ranks are in this one.
        number: of this step, for messages.
        observe: makes observers of the step.
    """
    result = StepResult(states=[{} for _ in states])
    entries = [Microbatch.of(entries) for entries in microbatches]
    given = _Given(params, entries, states, number, isinstance(observe, OneByOne))
    recording = _recording(plan, given, transport, observe)
    observers = {
        rank: [*(observe(plan, program, given.microbatches) if observe is not None else ()), *here.marks(program)]
        for rank, program in plan.programs.items()
    }
    if transport is not None:
        ((rank, _),) = plan.programs.items()
        try:
            for _ in _run(plan, rank, given, transport, recording, observers, result):
                raise AssertionError("a transport between processes blocks; it never yields")
        except BaseException:
            transport.abandon()
            raise
        transport.flush()
        return result
    hub = MemoryHub(plan.schedule.num_ranks)
    transports = {rank: MemoryTransport(hub, rank) for rank in plan.programs}
    run_together(
        [_run(plan, rank, given, transports[rank], recording, observers, result) for rank in plan.programs], hub
    )  # fmt: skip
    return result


class _Given(NamedTuple):
    """The arguments of a step."""

    params: Mapping[str, Tensor]
    microbatches: Sequence[Microbatch]
    states: Sequence[Mapping[str, Tensor]]
    number: int
    one_by_one: bool  # see `OneByOne`


def _recording(plan: Plan, given: _Given, transport: Transport | None, observe: Observe | None) -> Recording | None:
    """Return the recording that plays the step, filled; None if it runs op by op, as it must for observers of values."""
    if plan.recordings is None or not (observe is None or isinstance(observe, Timer)):
        return None
    (state,) = given.states
    return plan.recordings.of(
        plan, given.params, given.microbatches, state, given.number, cut=transport is not None, apart=observe is not None
    )


def _run(
    plan: Plan,
    rank: int,
    given: _Given,
    transport: Transport,
    recording: Recording | None,
    observers: Mapping[int, Sequence[Observer]],
    result: StepResult,
) -> Iterator[None]:
    """Run one rank's step, from binding its parameters to the finished gradients."""
    stages, reduction = [plan.stages[index] for index in plan.schedule.stages_of(rank)], plan.parameters.reduction()
    if recording is not None:
        yield from recording.run(rank, transport, reduction, given.number, observers)
        step = recording.step(rank, reduction)
    else:
        step = _rank_step(plan, rank, given, transport, reduction, observers[rank])
        try:
            yield from run_rank(step)
        finally:
            step.parameters.end()
    produced = [step.produced[index] for index in sorted(step.produced)]
    if plan.mode is Mode.ADVANCE:
        for into, lane in zip(result.states, flat_lanes(stages, step.states, len(given.states)), strict=True):
            into.update(lane)
    if not plan.mode.ends_in_loss:
        yield from _finish_outputs(plan, rank, [each.outputs for each in produced], transport, result)
        return
    yield from _finish_loss(plan, rank, produced, transport, result)
    if plan.mode is Mode.GRADS:
        weight = _tensor(result.weight)
        result.loss = mean(_tensor(result.total), weight, plan.loss)
        yield from _finish_grads(plan, step, given.params, divisor(weight), transport, result)
        result.state.update(flat_states(stages, step.states, plan.parameters.mesh))


def _rank_step(
    plan: Plan, rank: int, given: _Given, transport: Transport, reduction: Reduction, observers: Sequence[Observer]
) -> RankStep:
    """Make the step of a rank that runs op by op."""
    stages, program = [plan.stages[index] for index in plan.schedule.stages_of(rank)], plan.programs[rank]
    return RankStep(
        program=program,
        functions=plan.functions,
        stages={stage.index: stage for stage in stages},
        parameters=plan.parameters.step(given.params),
        reduction=reduction,
        accumulators={stage.index: Accumulator(plan.layouts[stage.index], plan.device) for stage in stages},
        microbatches=given.microbatches,
        ports=[transport.open(channel) for channel in program.channels],
        slots=plan.pools[rank].tensors(program.slots, plan.device),
        number=given.number,
        states=states_of(stages, given.states),
        apart=plan.mode is Mode.ADVANCE,
        observers=observers,
        pairs={} if given.one_by_one else plan.pairs,
    )


def _finish_loss(
    plan: Plan,
    rank: int,
    produced: Sequence[Produced],
    transport: Transport,
    result: StepResult,
) -> Iterator[None]:
    """Sum loss and weight, and combine aux, over all microbatches and data parallel ranks, for every rank."""

    def make() -> list[Tensor]:
        total = total_loss([_tensor(each.sum) for each in produced], [_tensor(each.weight) for each in produced])
        made = [sum_over(plan.parameters.mesh, DATA_AXES, total)]
        if plan.aux_spec is not None:
            combined = combine_aux(plan.loss, [each.aux for each in produced])
            leaves = [torch.as_tensor(leaf, device=plan.device) for leaf in tree.leaves_and_spec(combined)[0]]
            made += _aux_of_all(plan, leaves)
        return made

    shared: list[Tensor] = []
    layouts = [((2,), torch.float32), *plan.aux]
    yield from share(rank, plan.last_rank, make, layouts, plan.device, transport, shared)
    result.total, result.weight = shared[0].unbind()
    if plan.aux_spec is not None:
        result.aux = tree.from_leaves(shared[1:], plan.aux_spec)


def _finish_grads(
    plan: Plan,
    step: RankStep,
    params: Mapping[str, Tensor],
    weight: Tensor,
    transport: Transport,
    result: StepResult,
) -> Iterator[None]:
    """Sum the gradients of this rank's stages over data parallel ranks and holders, and divide them by the weight."""
    terms: set[str] = set()
    for index, stage in step.stages.items():
        if not plan.parameters.has_reduce_actions:
            step.reduction.post(dict(zip(stage.trainable_holders, step.accumulators[index].take(), strict=True)))
        partial = plan.functions[index].terms
        terms.update(path for path, is_term in zip(stage.trainable_holders, partial, strict=True) if is_term)
    sums = step.reduction.finish(terms)
    yield from exchange_ties(step.program.rank, sums, plan.ties, transport, plan.device)
    dtypes, lasting = {path: params[path].dtype for path in sums}, step.lasting and not plan.parameters.has_reduce_actions
    for path, gradient in divide(sums, weight, dtypes, lasting=lasting).items():
        result.grads[path] = like(params[path], gradient)


def _aux_of_all(plan: Plan, leaves: list[Tensor]) -> list[Tensor]:
    """Combine the aux of all data parallel ranks as the loss declares."""
    mesh = plan.parameters.rows_mesh
    _, size = data_coordinate(mesh)
    if size == 1:
        return leaves
    assert plan.aux_spec is not None
    columns = [gather_over(mesh, DATA_AXES, leaf) for leaf in leaves]
    each = [tree.from_leaves([column[place] for column in columns], plan.aux_spec) for place in range(size)]
    return tree.leaves_and_spec(combine_aux(plan.loss, each))[0]


def _tensor(value: Tensor | None) -> Tensor:
    assert value is not None, "the last stage ends in a loss"
    return value


def _finish_outputs(
    plan: Plan, rank: int, outputs: list[list[Tensor]], transport: Transport, result: StepResult
) -> Iterator[None]:
    """Join the model's outputs for all rows, and share them if the mode asks for it."""
    boundary = plan.boundaries.stages[-1]
    if plan.mode is Mode.SHARED_OUTPUTS:
        count = plan.schedule.num_microbatches
        layouts = [(_joined_shape(value.shape, count), value.dtype) for value in boundary.values]
        shared: list[Tensor] = []
        yield from share(rank, plan.last_rank, lambda: _joined(outputs), layouts, plan.device, transport, shared)
        result.outputs = boundary.assemble(shared)
    elif outputs:
        result.outputs = boundary.assemble(_joined(outputs))


def _joined(outputs: list[list[Tensor]]) -> list[Tensor]:
    """Join the tensors of all microbatches along dim 0; stack scalars."""
    return [torch.stack(column) if column[0].dim() == 0 else torch.cat(column) for column in zip(*outputs, strict=True)]


def _joined_shape(shape: tuple[int, ...], num_microbatches: int) -> tuple[int, ...]:
    return (num_microbatches * shape[0], *shape[1:]) if shape else (num_microbatches,)

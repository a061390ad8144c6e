"""Everything about a step that depends only on the batch's signature, resolved once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from autofunc import tree
from autofunc.engine import EngineOptions, GraphStage, Overlapped, StageFunctions
from autofunc.engine.recordable import check_recordable
from autofunc.errors import ScheduleError
from autofunc.losses import Loss, combine_aux
from autofunc.mesh import data_coordinate
from autofunc.runtime.buffers import SlotPool
from autofunc.runtime.build import captured, make_functions
from autofunc.runtime.cuda_graphs import check_recording
from autofunc.runtime.ops import Forward
from autofunc.runtime.program import Channel, Layout, Program, build_program, channels_between, message_layouts
from autofunc.runtime.recording import GraphMemory, Recordings
from autofunc.runtime.ties import Tie, find_ties
from autofunc.schedule import Edge, Schedule, lower, settled_sends, validate
from autofunc.shard.parameters import Parameters
from autofunc.splitting import (
    Boundaries,
    Returned,
    Stage,
    StageContext,
    Value,
    accumulator_dtype,
    follow,
    infer,
    parameter_dtypes,
)


class Mode(Enum):
    """What a step is for."""

    GRADS = "loss and gradients"
    LOSS = "loss"
    OUTPUTS = "outputs, on the last stage's rank"
    SHARED_OUTPUTS = "outputs, on every rank"
    ADVANCE = "outputs, on the last stage's rank, and the new state of each microbatch"

    @property
    def ends_in_loss(self) -> bool:
        """True if the last stage runs the loss."""
        return self in (Mode.GRADS, Mode.LOSS)

    @property
    def keeps_state(self) -> bool:
        """True if the step returns the new state of layers."""
        return self in (Mode.GRADS, Mode.ADVANCE)


@dataclass(frozen=True)
class Plan:
    """A step, ready to run for one batch signature."""

    mode: Mode
    stages: tuple[Stage, ...]
    loss: Loss | None
    schedule: Schedule  # lowered
    boundaries: Boundaries
    programs: Mapping[int, Program]  # by local pp rank
    pools: Mapping[int, SlotPool]  # by local pp rank: memory that receives write into
    contexts: Mapping[int, StageContext]  # by local stage
    functions: Mapping[int, StageFunctions]  # by local stage
    layouts: Mapping[int, tuple[Layout, ...]]  # by local stage: of each trainable holder's gradient sum
    parameters: Parameters  # how this process holds them
    ties: tuple[Tie, ...]
    channels: tuple[Channel, ...]  # of the whole pipeline
    aux: tuple[Layout, ...]  # shape and dtype of each leaf of the combined aux
    aux_spec: tree.TreeSpec | None
    device: torch.device
    pairs: Mapping[tuple[int, int], Overlapped] = field(default_factory=dict)  # by stages of F and B: interleaved
    recordings: Recordings | None = None  # of its steps, if they run as CUDA graphs

    @property
    def num_nodes(self) -> int:
        """Number of nodes in its graphs, which other plans may share."""
        return sum(stage.joint.num_nodes for stage in self.functions.values() if isinstance(stage, GraphStage))

    @property
    def last_rank(self) -> int:
        """The pp rank that holds the last stage, and so the loss."""
        return self.schedule.placement[-1]


@dataclass(frozen=True)
class Blueprint:
    """Everything about a pipeline that does not depend on the batch."""

    stages: tuple[Stage, ...]
    schedule: Schedule  # in compute form
    loss: Loss | None
    options: EngineOptions
    parameters: Parameters  # how this process holds them
    pools: Mapping[int, SlotPool]  # by local pp rank
    merge: bool = True  # lowering merges adjacent I and W into B
    sends_block: bool = False  # a send holds up its rank until the receive is posted
    graph_memory: GraphMemory = field(default_factory=GraphMemory)  # of recorded steps


def build_plan(
    blueprint: Blueprint, mode: Mode, params: Mapping[str, Tensor], device: torch.device,
    microbatches: Sequence[Mapping[str, Any]],
) -> Plan:  # fmt: skip
    """Infer the boundaries between stages, lower and validate the schedule, and compile the local ranks' programs.

    Args:
        blueprint: of the pipeline.
        mode: the kind of step.
        params: flat parameters of all ranks; only their dtypes matter.
        device: where this process computes.
        microbatches: of an example step; without gradients there may be fewer than in the schedule.

    Raises:
        ScheduleError: if gradients are wanted from a schedule without backwards, or the lowered schedule is invalid.
        ModelError: if a stage cannot run on such a microbatch, or cannot be captured or compiled.
        AutofuncError: if nothing fits into the memory budget.
    """
    stages, loss, parameters = blueprint.stages, blueprint.loss, blueprint.parameters
    if mode is Mode.GRADS and blueprint.schedule.is_forward_only:
        raise ScheduleError(
            f"schedule {blueprint.schedule.name} has no backward actions, so it gives no gradients; call the pipeline"
        )
    if blueprint.options.records:
        check_recording(device.type, "the parameters are")
    contexts, boundaries = _followed(blueprint, mode, params, device, microbatches[0])
    edges = boundaries.edges()
    lowered = _lowered(blueprint, mode, edges, len(microbatches))
    functions = make_functions(contexts, blueprint.options, lowered, boundaries)
    ties = _ties(blueprint, lowered, params) if mode is Mode.GRADS else ()
    messages = message_layouts(lowered, boundaries)
    settled = settled_sends(lowered, edges)
    keeps = {index: stage.bytes for index, stage in functions.items()}
    programs = {rank: build_program(lowered, rank, edges, messages, keeps, settled[rank]) for rank in blueprint.pools}
    aux, aux_spec = _combined_aux(loss, boundaries, lowered.num_microbatches, data_coordinate(parameters.rows_mesh)[1])
    return Plan(
        mode=mode,
        stages=stages,
        loss=loss,
        schedule=lowered,
        boundaries=boundaries,
        programs=programs,
        pools=blueprint.pools,
        contexts=contexts,
        functions=functions,
        layouts={index: tuple(context.accumulator_layouts) for index, context in contexts.items()},
        parameters=parameters,
        ties=ties,
        channels=tuple({*channels_between(lowered, messages), *(channel for tie in ties for channel in tie.channels())}),
        aux=aux,
        aux_spec=aux_spec,
        device=device,
        pairs=_pairs(programs.values(), functions),
        recordings=_recordings(blueprint, mode, functions, contexts),
    )


def _recordings(
    blueprint: Blueprint, mode: Mode, functions: Mapping[int, StageFunctions], contexts: Mapping[int, StageContext]
) -> Recordings | None:  # fmt: skip
    """Return None if steps are not recorded: `Mode.ADVANCE` writes into the caches it is given, wherever they lie."""
    if not blueprint.options.records or mode is Mode.ADVANCE:
        return None
    for index, stage in functions.items():
        assert isinstance(stage, GraphStage), "options ask for captured stages"
        check_recordable(stage.joint, contexts[index].stage.title)
    return Recordings(blueprint.graph_memory)


def _followed(
    blueprint: Blueprint, mode: Mode, params: Mapping[str, Tensor], device: torch.device, microbatch: Mapping[str, Any]
) -> tuple[dict[int, StageContext], Boundaries]:
    """Infer the local stages' contexts and all boundaries. Stages captured anyway tell their own boundary."""
    placement, by_capture = blueprint.schedule.placement, blueprint.options.engine == "graph"

    def returned_by(context: StageContext) -> Returned:
        is_local = placement[context.stage.index] in blueprint.pools
        return captured(context).returned if by_capture and is_local else infer(context)

    contexts, boundaries = follow(
        blueprint.stages, params, microbatch, blueprint.loss, device=device, with_loss=mode.ends_in_loss,
        with_grads=mode is Mode.GRADS, keeps_state=mode.keeps_state, setting=blueprint.parameters.setting,
        returned_by=returned_by,
    )  # fmt: skip
    return {c.stage.index: c for c in contexts if placement[c.stage.index] in blueprint.pools}, boundaries


def _lowered(blueprint: Blueprint, mode: Mode, edges: Sequence[Edge], num_microbatches: int) -> Schedule:
    """Lower the schedule, with transfers and sharding actions, and validate it."""
    schedule, parameters = blueprint.schedule, blueprint.parameters
    together = _overlapping(blueprint) if mode is Mode.GRADS else frozenset()
    lowered = lower(
        schedule.without_overlap(together) if mode is Mode.GRADS else schedule.forward_form(num_microbatches),
        edges,
        unshard=parameters.unshard,
        unshard_ahead=parameters.sharding.prefetch,
        reduce_grads=parameters.has_reduce_actions,
        merge=blueprint.merge,
        sends_block=blueprint.sends_block,
        keep_overlapped=True,
    )
    try:
        validate(lowered, edges, blueprint.sends_block)
    except ScheduleError as error:
        if together:
            error.add_note(
                "overlapped pairs begin together and send after both; overlap_f_b=False runs them one after the other"
            )
        raise
    return lowered


def _overlapping(blueprint: Blueprint) -> frozenset[tuple[int, int]]:
    """Return the pairs (stage of F, stage of B) that gain from overlap where a schedule marks them.

    Every rank computes it for all stages, because all must lower the whole schedule alike.
    """
    if not blueprint.options.overlaps:
        return frozenset()
    exchanging = {stage.index for stage in blueprint.stages if blueprint.parameters.exchanges_in(stage)}
    every = range(len(blueprint.stages))
    return frozenset((f, b) for f in every for b in every if f in exchanging or b in exchanging)


def _pairs(
    programs: Iterable[Program], functions: Mapping[int, StageFunctions]
) -> dict[tuple[int, int], Overlapped]:  # fmt: skip
    """Make the interleaved functions of the pairs that local ranks run."""
    pairs: dict[tuple[int, int], Overlapped] = {}
    for program in programs:
        for op, following in pairwise(program.ops):
            if isinstance(op, Forward) and op.beside and (op.stage, following.stage) not in pairs:
                forward, backward = functions[op.stage], functions[following.stage]
                assert isinstance(forward, GraphStage), "only pairs of captured stages are kept together"
                assert isinstance(backward, GraphStage), "only pairs of captured stages are kept together"
                pairs[op.stage, following.stage] = Overlapped(forward, backward)
    return pairs


def _ties(blueprint: Blueprint, schedule: Schedule, params: Mapping[str, Tensor]) -> tuple[Tie, ...]:
    """Find tied parameters, with the layouts of their sums as this process sends them."""
    model, parameters = blueprint.stages[0].model, blueprint.parameters
    precision, dtypes = parameters.setting.precision, parameter_dtypes(model, params)
    layouts: dict[str, Layout] = {}
    for path in model.spec:
        computed = precision.parameter_dtype(dtypes[model.canonical(path)])
        layouts[path] = tuple(parameters.local_shape(path)), accumulator_dtype(computed)
    return tuple(find_ties(blueprint.stages, schedule, layouts))


def _combined_aux(
    loss: Loss | None, boundaries: Boundaries, num_microbatches: int, places: int
) -> tuple[tuple[Layout, ...], tree.TreeSpec | None]:
    """Infer, on meta tensors, the layouts and tree of the combined aux of all microbatches and data parallel ranks."""
    if boundaries.aux is None:
        return (), None
    leaves = [
        torch.empty(leaf.shape, dtype=leaf.dtype, device="meta") if isinstance(leaf, Value) else leaf
        for leaf in boundaries.aux.leaves
    ]
    one = tree.from_leaves(leaves, boundaries.aux.spec)
    here = combine_aux(loss, [one] * num_microbatches)
    combined, spec = tree.leaves_and_spec(combine_aux(loss, [here] * places) if places > 1 else here)
    return tuple((tuple(leaf.shape), leaf.dtype) for leaf in combined), spec

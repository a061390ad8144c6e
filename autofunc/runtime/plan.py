"""Everything about a step that depends only on the batch's signature, resolved once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from autofunc import tree
from autofunc.engine import EngineOptions, StageContext, StageFunctions
from autofunc.engine.functions import accumulator_dtype
from autofunc.errors import ScheduleError
from autofunc.losses import Loss, combine_aux
from autofunc.mesh import data_coordinate
from autofunc.runtime.buffers import SlotPool
from autofunc.runtime.build import make_stages
from autofunc.runtime.program import Channel, Layout, Program, build_program, edge_channels
from autofunc.runtime.ties import Tie, find_ties
from autofunc.schedule import Schedule, lower, settled_sends, validate
from autofunc.shard.parameters import Parameters
from autofunc.splitting import Boundaries, Stage, Value, infer_boundaries, parameter_dtypes


class Mode(Enum):
    """What a step is for."""

    GRADS = "loss and gradients"
    LOSS = "loss"
    OUTPUTS = "outputs, on the last stage's rank"
    SHARED_OUTPUTS = "outputs, on every rank"

    @property
    def ends_in_loss(self) -> bool:
        """Whether the last stage runs the loss."""
        return self in (Mode.GRADS, Mode.LOSS)


@dataclass(frozen=True)
class Plan:
    """A step, ready to run for one batch signature."""

    mode: Mode
    stages: tuple[Stage, ...]
    loss: Loss | None
    schedule: Schedule  # lowered
    boundaries: Boundaries
    programs: Mapping[int, Program]  # by local pp rank
    slots: Mapping[int, Sequence[Tensor]]  # by local pp rank: memory that receives write into
    functions: Mapping[int, StageFunctions]  # by local stage
    layouts: Mapping[int, tuple[Layout, ...]]  # by local stage: of the sum of each trainable holder's gradients
    parameters: Parameters  # how this process holds them
    ties: tuple[Tie, ...]
    channels: tuple[Channel, ...]  # of the whole pipeline, in the same order on every rank
    aux: tuple[Layout, ...]  # shape and dtype of each leaf of the combined aux
    aux_spec: tree.TreeSpec | None
    device: torch.device

    @property
    def last_rank(self) -> int:
        """The pp rank that holds the last stage, and so the loss."""
        return self.schedule.placement[-1]


def build_plan(
    mode: Mode,
    stages: Sequence[Stage],
    schedule: Schedule,
    loss: Loss | None,
    options: EngineOptions,
    params: Mapping[str, Tensor],
    device: torch.device,
    microbatch: Mapping[str, Any],
    pools: Mapping[int, SlotPool],
    parameters: Parameters,
    merge: bool = True,
) -> Plan:
    """Infer the boundaries, lower and check the schedule, and compile the programs of the local ranks.

    Of `params` only the dtypes matter; they are those of all ranks. `pools` has one entry for each of them.
    """
    setting = parameters.setting
    if mode is Mode.GRADS and schedule.is_forward_only:
        raise ScheduleError(
            f"schedule {schedule.name} has no backward actions, so it gives no gradients; call the pipeline"
        )
    boundaries = infer_boundaries(
        stages, params, microbatch, loss, device=device, with_loss=mode.ends_in_loss, setting=setting
    )
    edges = boundaries.edges()
    sharding = parameters.sharding
    lowered = lower(
        schedule if mode is Mode.GRADS else schedule.forward_form(),
        edges,
        unshard=parameters.unshard,
        unshard_ahead=sharding.prefetch,
        reduce_grads=parameters.has_reduce_actions,
        merge=merge,
    )
    validate(lowered, edges)
    by_edge = edge_channels(lowered, boundaries)
    model = stages[0].model
    dtypes = {
        path: setting.precision.parameter_dtype(dtype) for path, dtype in parameter_dtypes(model, params).items()
    }  # fmt: skip
    local_stages = [stage for stage in stages if lowered.placement[stage.index] in pools]
    contexts = {
        stage.index: StageContext(
            stage,
            boundaries.stages[stage.index - 1] if stage.index else None,
            boundaries.stages[stage.index],
            loss,
            mode.ends_in_loss and stage is stages[-1],
            mode is Mode.GRADS,
            dtypes,
            microbatch,
            device,
            setting,
        )
        for stage in local_stages
    }
    functions = make_stages(contexts, options, lowered, boundaries)
    layouts = {
        path: (tuple(parameters.local_shape(path)), accumulator_dtype(dtypes[model.canonical(path)])) for path in model.spec
    }
    ties = tuple(find_ties(stages, lowered, layouts)) if mode is Mode.GRADS else ()
    settled = settled_sends(lowered, edges)
    keeps = {index: stage.bytes for index, stage in functions.items()}
    programs = {rank: build_program(lowered, rank, edges, by_edge, keeps, settled[rank]) for rank in pools}
    aux, aux_spec = _combined_aux(loss, boundaries, lowered.num_microbatches, data_coordinate(parameters.mesh)[1])
    return Plan(
        mode=mode,
        stages=tuple(stages),
        loss=loss,
        schedule=lowered,
        boundaries=boundaries,
        programs=programs,
        slots={rank: pools[rank].tensors(program.slots, device) for rank, program in programs.items()},
        functions=functions,
        layouts={index: tuple(context.accumulator_layouts) for index, context in contexts.items()},
        parameters=parameters,
        ties=ties,
        channels=(*by_edge.values(), *(channel for tie in ties for channel in tie.channels)),
        aux=aux,
        aux_spec=aux_spec,
        device=device,
    )


def _combined_aux(
    loss: Loss | None, boundaries: Boundaries, num_microbatches: int, places: int
) -> tuple[tuple[Layout, ...], tree.TreeSpec | None]:
    """What the aux of all microbatches, and data parallel ranks, looks like once combined: worked out on meta tensors."""
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

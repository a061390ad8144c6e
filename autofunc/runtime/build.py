"""From stages to their functions: equal stages are captured once, and "auto" chooses what to keep under a budget."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence

import numpy as np

from autofunc.engine import EagerStage, EngineOptions, GraphStage, Keep, StageContext, StageFunctions
from autofunc.engine.capture import Joint, capture
from autofunc.engine.same import fingerprint
from autofunc.errors import AutofuncError
from autofunc.schedule import Costs, Kind, Schedule, StageBytes, live_bytes, simulate
from autofunc.splitting import Boundaries


def make_stages(
    contexts: Mapping[int, StageContext],
    options: EngineOptions,
    schedule: Schedule,
    boundaries: Boundaries,
) -> dict[int, StageFunctions]:
    """The functions of some stages.

    Args:
        contexts: by stage.
        options: how they are differentiated.
        schedule: lowered.
        boundaries: of all stages.

    Raises:
        ModelError: when a stage cannot be captured or compiled.
        AutofuncError: when nothing fits into the memory budget.
    """
    if options.engine == "eager":
        return {index: EagerStage(context, remat=options.remat is not None) for index, context in contexts.items()}
    keys = {index: fingerprint(context) for index, context in contexts.items()}
    joints: dict[Hashable, Joint] = {}
    for index, context in contexts.items():
        if keys[index] not in joints:
            joints[keys[index]] = capture(context)
    keeps = dict.fromkeys(contexts, Keep() if options.remat == "auto" else Keep(options.remat))
    if options.memory_budget is not None and not schedule.is_forward_only:  # without a backward nothing is kept
        by_stage = {index: joints[keys[index]] for index in contexts}
        keeps = _fitting(by_stage, contexts, options.memory_budget, schedule, boundaries)
    kinds: dict[Hashable, set[Kind]] = {}
    for index in contexts:
        table = schedule[schedule.placement[index]].table
        mine = table[(table[:, 0] == index) & (table[:, 1] <= Kind.W), 1]
        kinds.setdefault((keys[index], keeps[index]), set()).update(Kind(kind) for kind in np.unique(mine))
    made: dict[Hashable, GraphStage] = {}
    for index, context in contexts.items():
        known = (keys[index], keeps[index])
        if known not in made:
            made[known] = GraphStage(
                joints[keys[index]], context, keeps[index], frozenset(kinds[known]), compiled=options.compile
            )
    return {index: made[keys[index], keeps[index]] for index in contexts}


def _choices(splits: bool) -> Iterator[Keep]:
    """What can be kept, from all to least."""
    early = (0.0, 0.25, 0.5, 0.75, 1.0) if splits else (0.0,)
    for recompute in (None, "cheap", "layer", "stage"):
        for part in early:
            yield Keep(recompute, part)


def _fitting(
    joints: Mapping[int, Joint],
    contexts: Mapping[int, StageContext],
    budget: int,
    schedule: Schedule,
    boundaries: Boundaries,
) -> dict[int, Keep]:
    """For each rank, the choice that makes the shortest step among those that fit, the same for all its stages."""
    found: dict[int, Keep] = {}
    edges = boundaries.edges()
    for rank in range(schedule.num_ranks):
        mine = [index for index in schedule.stages_of(rank) if index in joints]
        if not mine:
            continue
        splits = any(action.kind is Kind.I for action in schedule[rank])
        fitting: list[tuple[float, int, Keep]] = []
        least = 0.0
        for number, keep in enumerate(_choices(splits)):
            trial = {index: GraphStage(joints[index], contexts[index], keep, ()) for index in mine}
            memory = _with_others(boundaries, {index: stage.bytes for index, stage in trial.items()})
            peak = float(live_bytes(schedule, memory, edges, ranks=[rank])[0].max(initial=0.0))
            least = min(least, peak) if number else peak
            if peak <= budget:
                f, i, w = (sum(column) / len(mine) for column in zip(*(s.work for s in trial.values()), strict=True))
                fitting.append((simulate(schedule, Costs(f, i, w), edges).makespan, number, keep))
        if not fitting:
            raise AutofuncError(
                f"memory_budget={budget:,} bytes: rank {rank} with schedule {schedule.name} keeps at least {least:,.0f} "
                "bytes alive, whatever it computes again; allow that, or use more stages, smaller microbatches or a "
                "schedule with fewer activations"
            )
        found.update(dict.fromkeys(mine, min(fitting)[2]))
    return found


def _with_others(boundaries: Boundaries, known: Mapping[int, StageBytes]) -> Sequence[StageBytes]:
    """Stages of other ranks matter here for what they hand on only."""
    memory = []
    for index, boundary in enumerate(boundaries.stages):
        sizes = tuple(value.num_bytes for value in boundary.values)
        cotangents = tuple(value.num_bytes for value in boundary.values if value.needs_grad)
        memory.append(known.get(index, StageBytes(sizes, cotangents, 0, 0, 0)))
    return memory

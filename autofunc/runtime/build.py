"""From stages to their functions. Equal stages are captured and compiled once per process, for all its pipelines."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from autofunc import cache
from autofunc.engine import EagerStage, EngineOptions, GraphStage, Keep, StageFunctions
from autofunc.engine.capture import Joint, capture
from autofunc.runtime.budget import fitting_keeps
from autofunc.schedule import Kind, Schedule
from autofunc.splitting import Boundaries, StageContext


def captured(context: StageContext) -> Joint:
    """Return a stage's graph, captured once per process.

    Raises:
        ModelError: if it cannot be captured.
    """
    return cache.shared.get(("joint", context.fingerprint), lambda: capture(context), lambda joint: joint.num_nodes)


def make_functions(
    contexts: Mapping[int, StageContext],
    options: EngineOptions,
    schedule: Schedule,
    boundaries: Boundaries,
) -> dict[int, StageFunctions]:
    """Return the functions of stages, by stage.

    Args:
        contexts: by stage.
        options: how stages are differentiated and compiled.
        schedule: lowered.
        boundaries: of all stages.

    Raises:
        ModelError: if a stage cannot be captured or compiled.
        AutofuncError: if nothing fits into the memory budget.
    """
    if options.engine == "eager":
        return {
            index: EagerStage(context, boundaries.stages[index], remat=options.remat is not None)
            for index, context in contexts.items()
        }
    keeps = dict.fromkeys(contexts, Keep() if options.remat == "auto" else Keep(options.remat))
    if options.memory_budget is not None and not schedule.is_forward_only:  # without a backward nothing is kept
        joints = {index: captured(context) for index, context in contexts.items()}
        keeps = fitting_keeps(joints, contexts, options.memory_budget, schedule, boundaries)
    found: dict[int, StageFunctions] = {}
    for index, context in contexts.items():
        found[index] = stage = _graph_stage(context, keeps[index], options.compiles)
        table = schedule[schedule.placement[index]].table
        mine = table[(table[:, 0] == index) & (table[:, 1] <= Kind.W), 1]
        stage.make(Kind(kind) for kind in np.unique(mine))
    return found


def _graph_stage(context: StageContext, keep: Keep, compiled: bool) -> GraphStage:
    key = ("stage", context.fingerprint, keep, compiled, context.setting.arrive_by_layer)

    def make() -> GraphStage:
        return GraphStage(captured(context), context, keep, compiled=compiled)

    return cache.shared.get(key, make, lambda stage: stage.joint.num_nodes)

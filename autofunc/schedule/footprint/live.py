"""Bytes alive on each rank, action by action."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from autofunc.errors import ScheduleError
from autofunc.schedule.effects import Edge, Token, flow_of
from autofunc.schedule.footprint.memory import Memory
from autofunc.schedule.footprint.settle import settled_sends
from autofunc.schedule.footprint.storage import StageBytes, Storage, TokenStorages
from autofunc.schedule.ir import Kind, Schedule
from autofunc.schedule.lowering.lowered_form import lower


def live_bytes(
    schedule: Schedule,
    memory: Memory | Sequence[StageBytes],
    edges: Sequence[Edge] | None = None,
    ranks: Sequence[int] | None = None,
) -> tuple[npt.NDArray[np.float64], ...]:
    """Bytes alive on each rank after each action of the lowered schedule, parameters and the batch left out.

    A value lives from the action that makes or receives it to the one that reads it last; a value that is sent, until the
    schedule proves that it has arrived. Memory shared by several values counts once.

    Args:
        schedule: lowered; in compute form it is lowered first.
        memory: bytes of the values: rough (`Memory`, nothing shared), or exact, from `Pipeline.memory`.
        edges: connections between stages; a chain by default.
        ranks: which ranks to compute; all by default.

    Returns:
        Per rank, float64 of shape (number of actions in its lowered row,).

    Raises:
        ScheduleError: if `memory` is given for a different number of stages.
    """
    if isinstance(memory, Memory):
        memory = memory.by_stage(schedule.num_stages)
    elif len(memory) != schedule.num_stages:
        raise ScheduleError(f"memory is given for {len(memory)} stages; the schedule has {schedule.num_stages}")
    lowered = schedule if schedule.is_lowered else lower(schedule, edges)
    flow = flow_of(lowered, edges)
    storages = TokenStorages(memory, flow.edges)
    rows = []
    all_settled = settled_sends(lowered, flow.edges)
    for rank in range(lowered.num_ranks) if ranks is None else ranks:
        row, settled = lowered[rank], all_settled[rank]
        holders: Counter[Storage] = Counter()
        live, alive = 0.0, np.zeros(len(row))
        accumulating: set[int] = set()
        sent: dict[int, Token] = {}
        for position, action in enumerate(row):
            effect = flow.effect(action)
            released: list[Token] = [sent.pop(earlier) for earlier in settled.get(position, ())]
            if action.kind.is_send:
                sent[position] = effect.reads[0]
            else:
                released += effect.reads
            for token in effect.writes:
                for storage, size in storages.of(token):
                    live += size if not holders[storage] else 0
                    holders[storage] += 1
            for token in released:
                for storage, size in storages.of(token):
                    holders[storage] -= 1
                    live -= size if not holders[storage] else 0
            if action.kind.is_backward and action.stage not in accumulating:
                accumulating.add(action.stage)
                live += memory[action.stage].accumulators
            alive[position] = live
        rows.append(alive)
    return tuple(rows)


def peak_bytes(
    schedule: Schedule, memory: Memory | Sequence[StageBytes], edges: Sequence[Edge] | None = None
) -> tuple[float, ...]:
    """Return, per rank, the most bytes alive after any action of the lowered schedule; arguments as for `live_bytes`."""
    return tuple(float(row.max(initial=0.0)) for row in live_bytes(schedule, memory, edges))


def peak_held(schedule: Schedule, activation: Sequence[float], weight_activation: Sequence[float]) -> tuple[float, ...]:
    """Return, per rank, the most that its stages' residuals take, each from the start of F to the end of its B or W.

    Args:
        schedule: in any form.
        activation: by stage, the size of what F keeps until B or I.
        weight_activation: by stage, the size of what `I` keeps until W.
    """
    kept, weight = np.asarray(activation, np.float64), np.asarray(weight_activation, np.float64)
    change = np.stack((kept, -kept, weight - kept, -weight))  # by kind: F, B, I, W
    peaks = []
    for row in schedule:
        actions = row.table[row.table[:, 1] <= Kind.W]
        peaks.append(float(np.cumsum(change[actions[:, 1], actions[:, 0]]).max(initial=0.0)))
    return tuple(peaks)

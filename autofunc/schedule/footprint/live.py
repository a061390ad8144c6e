"""How many bytes are alive on each rank, action by action."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autofunc.errors import ScheduleError
from autofunc.schedule.effects import Edge, Residuals, Token, WeightResiduals, chain, flow_of
from autofunc.schedule.footprint.settle import settled_sends
from autofunc.schedule.footprint.storage import StageBytes, Storage, Storages
from autofunc.schedule.ir import Kind, Schedule
from autofunc.schedule.lowering.lowered_form import lower

PerStage = float | Sequence[float]


@dataclass(frozen=True)
class Memory:
    """Bytes of the values of one microbatch: scalars, or one value per stage.

    Args:
        residuals: what F keeps for B or I.
        weight_residuals: what I keeps for W.
        output: what a stage hands on, and the cotangent that comes back for it.
        accumulators: a stage's gradients, from its first backward to the end of the step.
    """

    residuals: PerStage
    weight_residuals: PerStage
    output: PerStage = 0.0
    accumulators: PerStage = 0.0

    def check(self, num_stages: int) -> None:
        """Refuse figures that do not fit a number of stages.

        Raises:
            ScheduleError: for a wrong number of values, or a negative one.
        """
        for name in ("residuals", "weight_residuals", "output", "accumulators"):
            value = np.asarray(getattr(self, name), np.float64)
            if value.ndim and value.shape != (num_stages,):
                raise ScheduleError(
                    f"Memory.{name} has shape {value.shape}; expected a number, or one for each of {num_stages} stages"
                )
            if (value < 0).any():
                raise ScheduleError(f"Memory.{name}={getattr(self, name)}: bytes cannot be negative")

    def per_stage(self, name: str, num_stages: int) -> npt.NDArray[np.float64]:
        """One of the fields, for every stage."""
        return np.broadcast_to(np.asarray(getattr(self, name), np.float64), num_stages)

    def by_stage(self, num_stages: int) -> list[StageBytes]:
        """The same figures, stage by stage."""
        self.check(num_stages)
        names = ("output", "residuals", "weight_residuals", "accumulators")
        columns = zip(*(self.per_stage(name, num_stages).tolist() for name in names), strict=True)
        return [StageBytes((out,), (out,), *rest) for out, *rest in columns]

    @classmethod
    def of_stages(cls, stages: Sequence[StageBytes], edges: Sequence[Edge] | None = None) -> Memory:
        """Rough figures from exact ones, for a search: every value that residuals hold counts as theirs.

        Args:
            stages: one per stage.
            edges: connections between stages; a chain by default.
        """
        storages = Storages(stages, chain(len(stages)) if edges is None else edges)
        kept, weight = (
            [sum(size for _, size in storages.of(token(stage, 0))) for stage in range(len(stages))]
            for token in (Residuals, WeightResiduals)
        )
        return cls(kept, weight, [sum(s.outputs) for s in stages], [s.accumulators for s in stages])


def live_bytes(
    schedule: Schedule,
    memory: Memory | Sequence[StageBytes],
    edges: Sequence[Edge] | None = None,
    ranks: Sequence[int] | None = None,
) -> tuple[npt.NDArray[np.float64], ...]:
    """Bytes alive on each rank after each action of the lowered schedule, parameters and the batch left out.

    A value lives from the action that makes or receives it to the one that reads it last; what is sent, until the schedule
    proves that it has arrived. Memory that several values share counts once.

    Args:
        schedule: lowered; in compute form it is lowered first.
        memory: bytes of the values: rough (`Memory`, with nothing shared), or as `Pipeline.memory` gives them.
        edges: connections between stages; a chain by default.
        ranks: which ranks to work out; all by default.
    """
    if isinstance(memory, Memory):
        memory = memory.by_stage(schedule.num_stages)
    elif len(memory) != schedule.num_stages:
        raise ScheduleError(f"memory is given for {len(memory)} stages; the schedule has {schedule.num_stages}")
    lowered = schedule if schedule.is_lowered else lower(schedule, edges)
    flow = flow_of(lowered, edges)
    storages = Storages(memory, flow.edges)
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


def peak_held(schedule: Schedule, activation: Sequence[float], weight_activation: Sequence[float]) -> tuple[float, ...]:
    """Per rank, the most that its stages' residuals take, each from the start of F to the end of its B or W.

    Args:
        schedule: in any form.
        activation: by stage, what F keeps until B or I.
        weight_activation: by stage, what I keeps until W.
    """
    kept, weight = np.asarray(activation, np.float64), np.asarray(weight_activation, np.float64)
    change = np.stack((kept, -kept, weight - kept, -weight))  # by kind: F, B, I, W
    peaks = []
    for row in schedule:
        actions = row.table[row.table[:, 1] <= Kind.W]
        peaks.append(float(np.cumsum(change[actions[:, 1], actions[:, 0]]).max(initial=0.0)))
    return tuple(peaks)


def peak_bytes(
    schedule: Schedule, memory: Memory | Sequence[StageBytes], edges: Sequence[Edge] | None = None
) -> tuple[float, ...]:
    """Per rank, the most bytes alive after any action; see `live_bytes`."""
    return tuple(float(row.max(initial=0.0)) for row in live_bytes(schedule, memory, edges))

"""How many bytes are alive on each rank, action by action."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autofunc.errors import ScheduleError
from autofunc.schedule.effects import Activation, Cotangent, Edge, Residuals, Token, flow_of
from autofunc.schedule.ir import Kind, Schedule
from autofunc.schedule.lower import lower

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


def live_bytes(
    schedule: Schedule, memory: Memory, edges: Sequence[Edge] | None = None
) -> tuple[npt.NDArray[np.float64], ...]:
    """Bytes alive on each rank after each action of the lowered schedule, parameters and the batch left out.

    A value lives from the action that makes or receives it to the one that reads or sends it.

    Args:
        schedule: lowered; in compute form it is lowered first.
        memory: bytes of the values.
        edges: connections between stages; a chain by default.
    """
    memory.check(schedule.num_stages)
    lowered = schedule if schedule.is_lowered else lower(schedule, edges)
    flow = flow_of(lowered, edges)
    residuals, weight, output, accumulators = (
        memory.per_stage(name, schedule.num_stages) for name in ("residuals", "weight_residuals", "output", "accumulators")
    )

    def size(token: Token) -> float:
        if isinstance(token, (Activation, Cotangent)):
            return float(output[token.producer])
        return float((residuals if isinstance(token, Residuals) else weight)[token.stage])

    rows = []
    for row in lowered:
        change = np.zeros(len(row))
        accumulating: set[int] = set()
        for position, action in enumerate(row):
            effect = flow.effect(action)
            change[position] += sum(map(size, effect.writes)) - sum(map(size, effect.reads))
            if action.kind in (Kind.B, Kind.W) and action.stage not in accumulating:
                accumulating.add(action.stage)
                change[position] += accumulators[action.stage]
        rows.append(np.cumsum(change))
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


def peak_bytes(schedule: Schedule, memory: Memory, edges: Sequence[Edge] | None = None) -> tuple[float, ...]:
    """Per rank, the most bytes alive after any action; see `live_bytes`."""
    return tuple(float(row.max(initial=0.0)) for row in live_bytes(schedule, memory, edges))

"""How long actions and transfers take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from autofunc.errors import ScheduleError
from autofunc.schedule.ir import Kind, Table
from autofunc.schedule.laws.walk import Times
from autofunc.shown import quoted


@dataclass(frozen=True)
class Costs:
    """How long one action of one stage takes: scalars, or one value per stage. A full backward takes `I + W`.

    All in one unit of the user's choice.

    Args:
        F: forward.
        I: backward of the input.
        W: backward of the weights.
        comm: how long one transfer occupies the wire between two ranks, which has room for one in each direction; or by
            (sending stage, receiving stage), where what is not listed is free.
        latency: from the end of a transfer until its value can be read.
        overlap: the part of `comm` that runs beside computation; for the rest the sending rank stands still.
        send: how long a rank is busy with posting one send; the transfer runs meanwhile.
        receive: how long a rank is busy with posting one receive.
        between: what else a rank does before each computation: it takes over what has arrived, and runs Python.
        spread: how much computations of one kind and stage differ, as a fraction of their time (one standard deviation).
            Only `expected_makespan` looks at it.
    """

    F: float | Sequence[float] = 1.0
    I: float | Sequence[float] = 1.0  # noqa: E741 - the field's own name
    W: float | Sequence[float] = 1.0
    comm: float | Mapping[tuple[int, int], float] = 0.0
    latency: float = 0.0
    overlap: float = 1.0
    send: float = 0.0
    receive: float = 0.0
    between: float = 0.0
    spread: float = 0.0

    def table(self, num_stages: int) -> Times:
        """The time of every kind of computation of every stage: float64 of shape (4, num_stages), rows F, B, I, W."""
        f, i, w = (np.broadcast_to(np.asarray(cost, np.float64), num_stages) for cost in (self.F, self.I, self.W))
        return np.stack((f, i + w, i, w))

    def durations(self, actions: Table, num_stages: int) -> Times:
        """The time each action of a table takes its rank."""
        by_kind = np.zeros((len(Kind), num_stages))
        by_kind[: Kind.W + 1] = self.table(num_stages)
        by_kind[[Kind.SEND_F, Kind.SEND_B]] = self.send
        by_kind[[Kind.RECV_F, Kind.RECV_B]] = self.receive
        return by_kind[actions[:, 1], actions[:, 0]]

    def transfer(self, sender: int, receiver: int) -> float:
        """How long a value occupies the edge between two stages."""
        return self.comm.get((sender, receiver), 0.0) if isinstance(self.comm, Mapping) else self.comm

    def scaled(self, factor: float) -> Costs:
        """The same costs with every computation `factor` times as long: a rank's costs times 1/v are a stage's."""
        f, i, w = (np.multiply(cost, factor).tolist() for cost in (self.F, self.I, self.W))
        return replace(self, F=f, I=i, W=w)

    def check(self, num_stages: int) -> None:
        """Refuse costs that do not fit a number of stages.

        Raises:
            ScheduleError: for a wrong number of values, a negative one, or stages whose every action is free.
        """
        for name in ("F", "I", "W", "comm", "latency", "send", "receive", "between"):
            given = getattr(self, name)
            value = np.asarray(list(given.values()) if isinstance(given, Mapping) else given, dtype=np.float64)
            per_stage = name in ("F", "I", "W")
            if value.ndim and not isinstance(given, Mapping) and not (per_stage and value.shape == (num_stages,)):
                expected = "a number" + (f", or one for each of {num_stages} stages" if per_stage else "")
                raise ScheduleError(f"Costs.{name} has shape {value.shape}; expected {expected}")
            if (value < 0).any() or not np.isfinite(value).all():
                raise ScheduleError(f"Costs.{name}={quoted(given)}: a time cannot be negative or without bound")
        if not 0.0 <= self.spread < np.inf:
            raise ScheduleError(f"Costs.spread={self.spread}: expected a fraction, 0 or more")
        if not 0.0 <= self.overlap <= 1.0:
            raise ScheduleError(f"Costs.overlap={self.overlap}: expected a fraction, from 0 to 1")
        for edge in self.comm if isinstance(self.comm, Mapping) else ():
            if not all(0 <= stage < num_stages for stage in edge):
                raise ScheduleError(f"Costs.comm names the edge {edge}; there are stages 0 to {num_stages - 1}")
        if not any(np.any(np.asarray(getattr(self, name))) for name in ("F", "I", "W")):
            raise ScheduleError("Costs: F, I and W are all 0, so nothing takes any time")

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

    All in one time unit of the user's choice.

    Args:
        F: forward.
        I: input gradient.
        W: weight gradients.
        comm: how long one transfer occupies the wire between two ranks, which carries one in each direction at a time; or
            by (sending stage, receiving stage), where edges that are not listed are free.
        latency: from the end of a transfer until its value can be read.
        overlap: the part of `comm` that runs beside computation; the sending rank is held up for the rest.
        send: how long posting one send keeps a rank busy; the transfer runs meanwhile.
        receive: how long posting one receive keeps a rank busy.
        between: overhead on a rank before each computation: taking over what has arrived, and Python.
        spread: timing noise of computations of one kind and stage: standard deviation over mean.
            Only `expected_makespan` uses it.
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
        """Return the time of every kind of computation by stage: float64 of shape (4, num_stages), rows F, B, I, W."""
        f, i, w = (np.broadcast_to(np.asarray(cost, np.float64), num_stages) for cost in (self.F, self.I, self.W))
        return np.stack((f, i + w, i, w))

    def durations(self, actions: Table, num_stages: int) -> Times:
        """Return how long each action of a table keeps its rank busy: float64 of shape (number of actions,)."""
        by_kind = np.zeros((len(Kind), num_stages))
        by_kind[: Kind.W + 1] = self.table(num_stages)
        by_kind[[Kind.SEND_F, Kind.SEND_B]] = self.send
        by_kind[[Kind.RECV_F, Kind.RECV_B]] = self.receive
        return by_kind[actions[:, 1], actions[:, 0]]

    def transfer(self, sender: int, receiver: int) -> float:
        """Return how long a value occupies the wire between two stages."""
        return self.comm.get((sender, receiver), 0.0) if isinstance(self.comm, Mapping) else self.comm

    def scaled(self, factor: float) -> Costs:
        """Make every computation `factor` times as long: a rank's costs times 1/v are those of one of its v stages."""
        f, i, w = (np.multiply(cost, factor).tolist() for cost in (self.F, self.I, self.W))
        return replace(self, F=f, I=i, W=w)

    def check(self, num_stages: int) -> None:
        """Refuse costs that do not fit a number of stages.

        Raises:
            ScheduleError: for a wrong number of values, a negative one, or if F, I and W are all 0.
        """
        for name in ("F", "I", "W", "comm", "latency", "send", "receive", "between"):
            given = getattr(self, name)
            value = np.asarray(list(given.values()) if isinstance(given, Mapping) else given, dtype=np.float64)
            per_stage = name in ("F", "I", "W")
            if value.ndim and not isinstance(given, Mapping) and not (per_stage and value.shape == (num_stages,)):
                expected = "a number" + (f", or one for each of {num_stages} stages" if per_stage else "")
                raise ScheduleError(f"Costs.{name} has shape {value.shape}; expected {expected}")
            if (value < 0).any() or not np.isfinite(value).all():
                raise ScheduleError(f"Costs.{name}={quoted(given)}: a time must be finite and not negative")
        if not 0.0 <= self.spread < np.inf:
            raise ScheduleError(f"Costs.spread={self.spread}: expected a fraction, 0 or more")
        if not 0.0 <= self.overlap <= 1.0:
            raise ScheduleError(f"Costs.overlap={self.overlap}: expected a fraction, from 0 to 1")
        for edge in self.comm if isinstance(self.comm, Mapping) else ():
            if not all(0 <= stage < num_stages for stage in edge):
                raise ScheduleError(f"Costs.comm names the edge {edge}; there are stages 0 to {num_stages - 1}")
        if not any(np.any(np.asarray(getattr(self, name))) for name in ("F", "I", "W")):
            raise ScheduleError("Costs: F, I and W are all 0, so nothing takes any time")

"""Observers of a running rank: when each op ran, how many bytes were alive, and a trace of each action."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autofunc.runtime.executor import RankStep, TurnObserver
from autofunc.runtime.ops import Backward, BackwardInput, Forward, Op, Receive, Send
from autofunc.runtime.program import Program
from autofunc.runtime.transport import Ticket
from autofunc.schedule import Turn


class Clock(TurnObserver):
    """Records when each op of a rank started and ended, excluding the wait for its operands.

    On an accelerator it records events on the stream, so the host runs ahead as in any step: waiting for the device at each
    op would measure the host, and deadlock with NCCL.
    """

    def __init__(self, num_ops: int, device: torch.device) -> None:
        self._start: list[Any] = [None] * num_ops
        self._end: list[Any] = [None] * num_ops
        self._turns: list[list[Any]] = []  # of interleaved ops, see `Turn`
        self._is_open = False  # the last turn has not ended
        self._now: Callable[[], Any] = time.perf_counter
        if device.type != "cpu":
            self._now = partial(_event, device)
            torch.accelerator.synchronize(device)
            self._begin, self._began = self._now(), time.perf_counter()

    def before(self, op: Op, step: RankStep, registers: list[Any]) -> None:
        """See `Observer.before`."""
        self._start[op.position] = self._now()

    def after(self, op: Op, step: RankStep, registers: list[Any], sends: list[Ticket | None]) -> None:
        """See `Observer.after`."""
        self._end[op.position] = self._now()
        if self._is_open:
            self._turns[-1][2], self._is_open = self._end[op.position], False

    def turn(self, op: Op, waits: bool) -> None:
        """See `TurnObserver.turn`."""
        now = self._now()
        if self._is_open:
            self._turns[-1][2] = now
        self._turns.append([op.position, now, None, waits])
        self._is_open = True

    def times(self) -> tuple[list[float], list[float], list[Turn]]:
        """Return starts and ends by position, and turns, in seconds of the host's `time.perf_counter`; wait for the device.

        Of two interleaved ops, the first gets the time of its turns and the second the rest, so that their total is
        right.
        """
        if self._now is not time.perf_counter:
            torch.accelerator.synchronize()
        start, end = ([self._seconds(moment) for moment in row] for row in (self._start, self._end))
        turns = [Turn(at, self._seconds(began), self._seconds(ended), waits) for at, began, ended, waits in self._turns]
        for position, spent in _spent(turns).items():
            if position + 1 < len(start) and start[position + 1] < end[position]:  # the first of the two
                end[position] = start[position + 1] = start[position] + spent
        return start, end, turns

    def _seconds(self, moment: Any) -> float:
        on_host = self._now is time.perf_counter
        return float(moment if on_host else self._began + self._begin.elapsed_time(moment) / 1e3)


def _spent(turns: Iterable[Turn]) -> dict[int, float]:
    """Return the total length of turns, by position."""
    spent: dict[int, float] = {}
    for position, start, end, _ in turns:
        spent[position] = spent.get(position, 0.0) + end - start
    return spent


def _event(device: torch.device) -> torch.Event:
    """Record an event at the current point of the device's stream."""
    event = torch.Event(device, enable_timing=True)
    event.record()
    return event


class LiveBytes:
    """Records the bytes of all distinct storages alive after each op, without parameters, the batch and constants.

    Args:
        num_ops: of the rank's program.
        excluded: tensors not to count.
    """

    def __init__(self, num_ops: int, excluded: Iterable[Tensor]) -> None:
        self.alive = [0] * num_ops
        self._excluded = {tensor.untyped_storage().data_ptr() for tensor in excluded}

    def before(self, op: Op, step: RankStep, registers: list[Any]) -> None:
        """See `Observer.before`."""

    def after(self, op: Op, step: RankStep, registers: list[Any], sends: list[Ticket | None]) -> None:
        """See `Observer.after`."""
        held = [registers, [ticket.tensors for ticket in sends if ticket is not None]]
        held += [total.held for total in step.accumulators.values()]
        storages = (tensor.untyped_storage() for tensor in _tensors(held))
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        slots = {slot.untyped_storage().data_ptr(): slot.nbytes for slot in step.slots}  # views of larger shared buffers
        sizes.update({place: size for place, size in slots.items() if place in sizes})
        self.alive[op.position] = sum(size for place, size in sizes.items() if place not in self._excluded)


def _tensors(held: Any) -> Iterator[Tensor]:
    """Yield all tensors in lists, tuples and tickets."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, (list, tuple)):
        for part in held:
            yield from _tensors(part)
    elif hasattr(held, "tensors"):
        yield from _tensors(held.tensors)


class Trace:
    """Prints every action with the shapes of its results."""

    def __init__(self, program: Program) -> None:
        self._row = program.schedule[program.rank]
        self._program = program

    def before(self, op: Op, step: RankStep, registers: list[Any]) -> None:
        """See `Observer.before`."""

    def after(self, op: Op, step: RankStep, registers: list[Any], sends: list[Ticket | None]) -> None:
        """See `Observer.after`."""
        shapes: list[tuple[int, ...]] = []
        if isinstance(op, Receive):
            shapes = [shape for shape, _ in (self._program.slots[slot] for slot in op.slots)]
        elif isinstance(op, Send):
            shapes = [tuple(leaf.shape) for leaf in sends[op.number].tensors]  # type: ignore[union-attr]
        elif isinstance(op, (Forward, Backward, BackwardInput)):
            shapes = [tuple(leaf.shape) for register in op.writes for leaf in registers[register]]
        text = f"{self._row[op.position]} {' '.join(map(str, shapes))}"
        sys.stderr.write(f"autofunc: rank {self._program.rank} step {step.number} {text}\n")

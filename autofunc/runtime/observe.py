"""What can be seen of a running rank: when every op ran, how many bytes were alive, and each action as it runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from autofunc.runtime.executor import RankStep
from autofunc.runtime.ops import Backward, BackwardInput, Forward, Op, Receive, Send
from autofunc.runtime.program import Program
from autofunc.runtime.transport import Ticket


class Clock:
    """When each op of a rank started and ended, in seconds of one clock: waiting for its operands comes before."""

    def __init__(self, num_ops: int, device: torch.device) -> None:
        self.start, self.end = [0.0] * num_ops, [0.0] * num_ops
        self._synchronize = torch.accelerator.synchronize if device.type != "cpu" else None

    def before(self, op: Op, step: RankStep, registers: list[Any]) -> None:
        """See `Observer.before`."""
        self.start[op.position] = self._now()

    def after(self, op: Op, step: RankStep, registers: list[Any], sends: list[Ticket | None]) -> None:
        """See `Observer.after`."""
        self.end[op.position] = self._now()

    def _now(self) -> float:
        """The time when all that was started is done."""
        if self._synchronize is not None:
            self._synchronize()
        return time.perf_counter()


class LiveBytes:
    """Bytes of the distinct storages that are alive after each op, without parameters, the batch and constants.

    Args:
        num_ops: of the rank's program.
        excluded: tensors that do not count.
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
        slots = {slot.untyped_storage().data_ptr(): slot.nbytes for slot in step.slots}  # of this plan, in shared memory
        sizes.update({place: size for place, size in slots.items() if place in sizes})
        self.alive[op.position] = sum(size for place, size in sizes.items() if place not in self._excluded)


def _tensors(held: Any) -> Iterator[Tensor]:
    """All tensors in lists, tuples and tickets."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, (list, tuple)):
        for part in held:
            yield from _tensors(part)
    elif hasattr(held, "tensors"):
        yield from _tensors(held.tensors)


class Trace:
    """Prints every action with the shapes of what it makes."""

    def __init__(self, program: Program) -> None:
        self._row = program.schedule[program.rank]
        self._program = program

    def before(self, op: Op, step: RankStep, registers: list[Any]) -> None:
        """See `Observer.before`."""

    def after(self, op: Op, step: RankStep, registers: list[Any], sends: list[Ticket | None]) -> None:
        """See `Observer.after`."""
        shapes: list[tuple[int, ...]] = []
        if isinstance(op, (Send, Receive)):
            shapes = [shape for shape, _ in self._program.channels[op.channel].layouts]
        elif isinstance(op, (Forward, Backward, BackwardInput)):
            shapes = [tuple(leaf.shape) for register in op.writes for leaf in registers[register]]
        text = f"{self._row[op.position]} {' '.join(map(str, shapes))}"
        sys.stderr.write(f"autofunc: rank {self._program.rank} step {step.number} {text}\n")

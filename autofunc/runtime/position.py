"""The position of this process: its phase and action, so that others can report it when it is late or gone.

Nothing is recorded unless a watchdog or launcher is active. Then it costs two assignments per action and, with a launcher,
a few bytes written to a memory-mapped file.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autofunc.runtime.ops import Op, Receive
from autofunc.runtime.program import PLACE_BYTES, Program

if TYPE_CHECKING:
    from autofunc.runtime.executor import RankStep

_PHASE_BYTES = 80
RECORD_BYTES = _PHASE_BYTES + PLACE_BYTES
"""Bytes per process in the file that a launcher reads."""


class Position:
    """What a process is doing. Its main thread writes, others read."""

    def __init__(self) -> None:
        self.is_on = False
        self.changes = 0  # counts every event
        self.phase = "starting"
        self.is_settled = False  # a step of this kind has run before, so its duration is known
        self.slowest_step_seconds = 0.0
        self.program: Program | None = None  # of the running step
        self.ranks: Sequence[int] | None = None  # global, by pp rank
        self.op: Op | None = None  # the last one
        self.is_inside = False  # True while it runs, False once it is done
        self._began = 0.0
        self._record: memoryview | None = None

    def publish(self, file: Path, number: int) -> None:
        """Write from now on to this process's record in a file.

        Args:
            file: created by `make_file`.
            number: of the process.
        """
        with file.open("r+b") as opened:
            shared = memoryview(mmap.mmap(opened.fileno(), 0))
        self._record = shared[number * RECORD_BYTES : (number + 1) * RECORD_BYTES]
        self.enter(self.phase)

    def enter(self, phase: str) -> None:
        """Set the current phase."""
        self.phase, self.op, self.program = phase, None, None
        self.changes += 1
        if self._record is not None:
            self._record[:] = phase.encode()[:_PHASE_BYTES].ljust(RECORD_BYTES)

    @contextmanager
    def building(self) -> Iterator[None]:
        """Mark the building of a plan: its duration is unknown, and the first step with it may compile."""
        before, self.is_settled = self.phase, False
        self.enter(f"{before}: building a plan for such a batch")
        yield
        self.enter(before)

    @contextmanager
    def unhurried(self, phase: str) -> Iterator[None]:
        """Mark work of unknown duration, such as writing to disk."""
        before, was_settled = self.phase, self.is_settled
        self.is_settled = False
        self.enter(phase)
        yield
        self.is_settled = was_settled
        self.enter(before)

    def begin(self, number: int, ranks: Sequence[int] | None) -> None:
        """Mark the beginning of a step.

        Args:
            number: of the step.
            ranks: the global rank of each pp rank; None if all are in this process.
        """
        if self.is_on:
            self.enter(f"step {number}")
            self.ranks, self._began = ranks, time.monotonic()

    def marks(self, program: Program) -> Sequence[_Marks]:
        """Return the observers that record the actions of a rank in the step that begins; none if recording is off."""
        if not self.is_on:
            return ()
        self.program = program
        return (_Marks(self, self._record, program),)

    def end(self, number: int) -> None:
        """Mark the end of a step."""
        if self.is_on:
            if self.is_settled:
                self.slowest_step_seconds = max(self.slowest_step_seconds, time.monotonic() - self._began)
            self.is_settled = True
            self.enter(f"after step {number}")

    @property
    def action(self) -> str:
        """The running or next action; empty outside a step."""
        return "" if self.program is None else self.program.places[_place(self.op, self.is_inside)]

    def awaited(self) -> list[int]:
        """Return the global ranks whose values the next action may still be waiting for."""
        program, ops = self.program, self.program.ops if self.program is not None else ()
        position = 0 if self.op is None else self.op.position + 1
        if program is None or self.is_inside or position >= len(ops):
            return []
        beside = bool(getattr(ops[position], "beside", False))  # then it waits for what both read
        wanted = {register for op in ops[position : position + 1 + beside] for register in getattr(op, "waits", ())}
        sources = [program.channels[op.channel].source for op in ops if isinstance(op, Receive) and op.register in wanted]
        return [source if self.ranks is None else self.ranks[source] for source in dict.fromkeys(sources)]


here = Position()
"""The position of this process."""


class _Marks:
    """An observer (see `executor.Observer`) that records a rank's position."""

    def __init__(self, position: Position, record: memoryview | None, program: Program) -> None:
        self._position, self._record, self._places = position, record, program.encoded_places
        self._note(None, False)

    def before(self, op: Op, step: RankStep, registers: list[Any]) -> None:
        """See `Observer.before`."""
        self._note(op, True)

    def after(self, op: Op, step: RankStep, registers: list[Any], sends: list[Any]) -> None:
        """See `Observer.after`."""
        self._note(op, False)

    def _note(self, op: Op | None, is_inside: bool) -> None:
        position = self._position
        position.op, position.is_inside = op, is_inside
        position.changes += 1
        if self._record is not None:
            self._record[_PHASE_BYTES:] = self._places[_place(op, is_inside)]


def _place(op: Op | None, is_inside: bool) -> int:
    """Return the index of a position in `Program.places`."""
    return 0 if op is None else 2 * op.position + (1 if is_inside else 2)


def make_file(file: Path, number: int) -> None:
    """Create the file that `number` processes write their positions to."""
    file.write_bytes(b" " * (RECORD_BYTES * number))


def read_file(file: Path) -> list[str]:
    """Return the position of each process, or its last one if it has ended: such as "step 7, in 1F3"."""
    records, positions = file.read_bytes(), []
    for begin in range(0, len(records), RECORD_BYTES):
        record = records[begin : begin + RECORD_BYTES]
        parts = (record[:_PHASE_BYTES], record[_PHASE_BYTES:])
        positions.append(", ".join(text for part in parts if (text := part.decode(errors="replace").strip())))
    return positions

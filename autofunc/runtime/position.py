"""Where this process is: what it does, and at which action, so that others can say so when it is late or gone.

Nothing is noted until somebody wants to know. Then it is two assignments for each action, and, where a launcher reads
along, a few bytes written into a file that lies in memory.
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
"""Of a process in the file that a launcher reads."""


class Position:
    """What a process does. Its main thread writes, others read."""

    def __init__(self) -> None:
        self.is_on = False
        self.changes = 0  # counts up with everything that happens
        self.phase = "starting"
        self.is_settled = False  # whether a step of this kind has run before, so that it is known how long one takes
        self.slowest_step_seconds = 0.0
        self.program: Program | None = None  # of the step that runs
        self.ranks: Sequence[int] | None = None  # global, by pp rank
        self.op: Op | None = None  # the last one
        self.is_inside = False  # whether it runs; else it is done
        self._began = 0.0
        self._record: memoryview | None = None

    def publish(self, file: Path, number: int) -> None:
        """Write from now on into the part of a file that belongs to a process.

        Args:
            file: of `make_file`.
            number: of the process.
        """
        with file.open("r+b") as opened:
            shared = memoryview(mmap.mmap(opened.fileno(), 0))
        self._record = shared[number * RECORD_BYTES : (number + 1) * RECORD_BYTES]
        self.enter(self.phase)

    def enter(self, phase: str) -> None:
        """Say what comes now, until something else does."""
        self.phase, self.op, self.program = phase, None, None
        self.changes += 1
        if self._record is not None:
            self._record[:] = phase.encode()[:_PHASE_BYTES].ljust(RECORD_BYTES)

    @contextmanager
    def building(self) -> Iterator[None]:
        """A plan is made: nobody knows for how long, and the first step with it may compile."""
        before, self.is_settled = self.phase, False
        self.enter(f"{before}: building a plan for such a batch")
        yield
        self.enter(before)

    @contextmanager
    def unhurried(self, phase: str) -> Iterator[None]:
        """Something that takes as long as it takes, such as writing to a disk."""
        before, was_settled = self.phase, self.is_settled
        self.is_settled = False
        self.enter(phase)
        yield
        self.is_settled = was_settled
        self.enter(before)

    def begin(self, number: int, ranks: Sequence[int] | None) -> None:
        """A step begins.

        Args:
            number: of the step.
            ranks: the global rank of each pp rank; None when all are in this process.
        """
        if self.is_on:
            self.enter(f"step {number}")
            self.ranks, self._began = ranks, time.monotonic()

    def marks(self, program: Program) -> Sequence[_Marks]:
        """Who notes the actions of a rank of the step that begins: nobody, when nobody wants to know."""
        if not self.is_on:
            return ()
        self.program = program
        return (_Marks(self, self._record, program),)

    def end(self, number: int) -> None:
        """A step is done."""
        if self.is_on:
            if self.is_settled:
                self.slowest_step_seconds = max(self.slowest_step_seconds, time.monotonic() - self._began)
            self.is_settled = True
            self.enter(f"after step {number}")

    @property
    def action(self) -> str:
        """The action it runs, or the one that it comes to next; nothing outside of a step."""
        return "" if self.program is None else self.program.places[_place(self.op, self.is_inside)]

    def awaited(self) -> list[int]:
        """The ranks from which the next action needs what is not known to be there: global ranks."""
        program, ops = self.program, self.program.ops if self.program is not None else ()
        position = 0 if self.op is None else self.op.position + 1
        if program is None or self.is_inside or position >= len(ops):
            return []
        beside = bool(getattr(ops[position], "beside", False))  # then it waits for what both read
        wanted = {register for op in ops[position : position + 1 + beside] for register in getattr(op, "waits", ())}
        sources = [program.channels[op.channel].source for op in ops if isinstance(op, Receive) and op.register in wanted]
        return [source if self.ranks is None else self.ranks[source] for source in dict.fromkeys(sources)]


here = Position()
"""Of this process."""


class _Marks:
    """An observer (see `executor.Observer`) that notes where a rank is."""

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
    """Into `Program.places`."""
    return 0 if op is None else 2 * op.position + (1 if is_inside else 2)


def make_file(file: Path, number: int) -> None:
    """Make the file that a number of processes write their positions into."""
    file.write_bytes(b" " * (RECORD_BYTES * number))


def read_file(file: Path) -> list[str]:
    """Where each process is, or was when it ended: such as "step 7, in 1F3"."""
    records, said = file.read_bytes(), []
    for begin in range(0, len(records), RECORD_BYTES):
        record = records[begin : begin + RECORD_BYTES]
        parts = (record[:_PHASE_BYTES], record[_PHASE_BYTES:])
        said.append(", ".join(text for part in parts if (text := part.decode(errors="replace").strip())))
    return said

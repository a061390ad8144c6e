"""Reports on processes that make no progress: who waits for whom, and what the late one does."""

from __future__ import annotations

import linecache
import queue
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from autofunc.installed import is_installed, is_of_torch
from autofunc.shown import in_ranges

_OWN = Path(__file__).parents[1]
_WAITS = {
    _OWN / "runtime" / "transport.py": "a transfer",
    _OWN / "runtime" / "socket_ports.py": "a transfer",
    _OWN / "runtime" / "agree.py": "other ranks to prepare the same step",
    _OWN / "shard" / "reduce.py": "gradients to be summed over data parallel ranks",
    _OWN / "shard" / "fsdp.py": "parameters to be gathered from data parallel ranks",
    _OWN / "shard" / "dtensors.py": "a tensor to be gathered from other ranks",
    _OWN / "shard" / "expert_exchange.py": "rows of the ranks that share its experts",
    _OWN / "shard" / "data_sum.py": "a sum over data parallel ranks",
    _OWN / "shard" / "links.py": "a tensor of other tp or cp ranks",
}
"""The files in which this library waits for other ranks, and what for."""
_PASSED = {_OWN / "shard" / "unix_sockets.py", Path(queue.__file__), Path(threading.__file__)}
"""Files whose frames may lie between these and the call that waits."""
_OPERATORS = ("c10d_functional", "c10d::")
"""Parts of the names of operators that wait for other ranks."""
_DEBUGGERS = ("pdb.py", "bdb.py", "pydevd.py")
_MOST_RANKS = 16  # lines about ranks
_MOST_FRAMES = 12  # printed of a stack


@dataclass(frozen=True)
class Frame:
    """A call in the stack of a thread."""

    file: str
    line: int
    name: str
    code: str

    def __str__(self) -> str:
        shown = re.sub(r".*/(site|dist)-packages/", "", self.file)
        return f"{shown}, line {self.line}, in {self.name}: {self.code}"


@dataclass(frozen=True)
class State:
    """A process's report about itself."""

    phase: str  # such as "step 7"
    action: str  # such as "in 1F3"; empty outside a step
    awaited: tuple[int, ...]  # ranks that the next action needs values from
    silent_seconds: float  # without progress
    limit_seconds: float  # allowed without progress
    stack: tuple[Frame, ...]  # of its main thread, outermost call first

    @property
    def place(self) -> str:
        """Its phase and action, as text."""
        return ", ".join(part for part in (self.phase, self.action) if part)

    @property
    def is_looked_into(self) -> bool:
        """True if it is stopped in a debugger."""
        return any(Path(frame.file).name in _DEBUGGERS for frame in self.stack)

    @property
    def collective(self) -> Frame | None:
        """The `torch.distributed` call it is in, or None."""
        own = [number for number, frame in enumerate(self.stack) if not is_of_torch(frame.file)]
        inside = self.stack[own[-1] + 1 :] if own else self.stack
        return next((frame for frame in inside if _is_distributed(frame)), None)

    @property
    def waits_for(self) -> str:
        """What this library waits for from other ranks; empty if it does not wait."""
        own = (each for each in reversed(self.stack) if not is_of_torch(each.file) and Path(each.file) not in _PASSED)
        last = next(own, None)
        return _WAITS.get(Path(last.file), "") if last is not None else ""

    @property
    def waits(self) -> bool:
        """True if it waits for other ranks."""
        return self.collective is not None or bool(self.waits_for)

    @property
    def users_line(self) -> str:
        """The innermost line outside installed libraries; else the innermost line of all."""
        users = [frame for frame in self.stack if not is_installed(frame.file)]
        return str((users or self.stack)[-1]) if self.stack else "an unknown line"


def frames_of(innermost: FrameType | None) -> tuple[Frame, ...]:
    """Return the calls of a thread, outermost first."""
    frames: list[Frame] = []
    while innermost is not None:
        code, line, operator = innermost.f_code, innermost.f_lineno, ""
        if not frames and code.co_filename.endswith("_ops.py"):  # the frame's `self` names the operator, its code does not
            operator = str(innermost.f_locals.get("self", ""))
        text = linecache.getline(code.co_filename, line).strip()
        frames.append(Frame(code.co_filename, line, operator or code.co_name, text))
        innermost = innermost.f_back
    return tuple(frame for frame in reversed(frames) if not frame.file.startswith("<frozen"))


def describe(states: Mapping[int, State | None], positions: Sequence[str] = ()) -> str:
    """Describe what all ranks do, and which of them the others wait for.

    Args:
        states: by rank; None for one that does not answer.
        positions: of all ranks as last recorded, if known.
    """
    alike: dict[str, list[int]] = {}
    for rank, state in sorted(states.items()):
        alike.setdefault(_line(state, positions[rank] if rank < len(positions) else ""), []).append(rank)
    lines = [f"  rank{'s' if len(ranks) > 1 else ''} {in_ranges(ranks)}: {text}" for text, ranks in alike.items()]
    if len(lines) > _MOST_RANKS:
        lines = [*lines[:_MOST_RANKS], f"  and {len(lines) - _MOST_RANKS} more"]
    return "\n".join([*lines, *_verdict(states)])


def late(states: Mapping[int, State | None]) -> list[int]:
    """Return the ranks that do not wait for others; if all do, those in a collective that the others have not entered."""
    busy = [rank for rank, state in states.items() if state is None or not state.waits]
    if busy:
        return busy
    asked = {rank for state in states.values() if state is not None for rank in state.awaited}
    alone = [rank for rank, state in states.items() if state is not None and state.collective is not None]
    return [rank for rank in alone if rank in asked or not asked]


def _verdict(states: Mapping[int, State | None]) -> list[str]:
    culprits = late(states)
    if not culprits:
        return ["all wait for each other: their schedules, or the order in which they call pipelines, differ"]
    waiting = all(state is not None and state.waits for state in states.values())
    lines = []
    for rank in culprits[:4]:
        state = states[rank]
        if state is None:
            continue
        how = "waits for others that do not make the same call" if waiting else "is late"
        lines.append(f"rank {rank} {how}; its Python stack, outermost call first:")
        lines += [f"  {frame}" for frame in _shown(state.stack)]
    return lines


def _line(state: State | None, position: str) -> str:
    if state is None:
        at = f"; last seen at: {position}" if position else ""
        return f"does not answer: its process is stopped or gone, or holds Python's GIL{at}"
    since = f"for {state.silent_seconds:.0f} s"
    if state.awaited and state.waits_for:
        return f"{state.place}, waits for rank {', '.join(map(str, state.awaited))} {since}"
    if state.waits_for:
        return f"{state.place}, waits for {state.waits_for} {since}"
    if state.collective is not None:
        return f"{state.place}, in {state.collective.name} {since}; {state.users_line}"
    return f"{state.place} {since}; {state.users_line}"


def _shown(stack: Sequence[Frame]) -> list[Frame]:
    """Return the frames from the user's first to last, plus the call after it; all of them if none is the user's."""
    users = [number for number, frame in enumerate(stack) if not is_installed(frame.file)]
    return list(stack[users[0] : users[-1] + 2] if users else stack)[-_MOST_FRAMES:]


def _is_distributed(frame: Frame) -> bool:
    if any(part in frame.name for part in _OPERATORS):
        return True
    return is_of_torch(frame.file) and "distributed" in Path(frame.file).parts and frame.name != "wrapper"

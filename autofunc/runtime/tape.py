"""A step on tape: the kernels that it launches, as a few CUDA graphs, and what runs between them.

A tape is an observer of a rank's first run on it. In that run nothing is computed: kernels are captured, and transfers
and everything else that is no kernel are noted, to be done at their places whenever the tape is played. Ranks that share a
process are on one tape, transfers included, which are copies there: all of their step is one graph. Between processes a
transfer ends a graph, and the next computation begins another.

All graphs of a tape take their memory from one pool, in the order in which they are played, so that what is alive at
the same time lies apart, as in a step without them: microbatches that are under way need no copies, and the pool is as
large as such a step's peak. Recorded for each kind of piece alone, every slot would have to be as large as its largest
value, or residuals be copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from autofunc.runtime.ops import Backward, BackwardInput, BackwardWeight, Forward, Op
from autofunc.runtime.transport import Port, Ticket

_COMPUTATIONS = (Forward, Backward, BackwardInput, BackwardWeight)


class Graph(Protocol):
    """Kernels that are captured once, and then launched together."""

    def begin(self) -> None:
        """From now on kernels of the current stream are captured, and not run."""
        ...

    def end(self) -> None:
        """The capture is complete."""
        ...

    def replay(self) -> None:
        """Launch them."""
        ...


class Part(NamedTuple):
    """Something on a tape."""

    play: Callable[[], Any]  # False: it waits, and is to be called again
    rank: int | None = None  # whose actions they are; None where nobody is told
    first: Op | None = None
    last: Op | None = None


class Tape:
    """Records in one run, and plays any number of times.

    Args:
        new_graph: makes an empty graph.
        cut: transfers are not captured.
        apart: each action is a part of its own, so that it can be timed.
    """

    def __init__(self, new_graph: Callable[[], Graph], *, cut: bool, apart: bool) -> None:
        self._new_graph, self._cut, self._apart = new_graph, cut, apart
        self._graph: Graph | None = None  # that captures now
        self._first: Op | None = None  # in it
        self._last: Op | None = None
        self._inside: Op | None = None  # the action that runs
        self._rank = 0
        self._buffers: dict[Any, list[Tensor]] = {}  # of sends, by shape and dtype: those that are free
        self.parts: list[Part] = []
        self.num_graphs = 0

    # --- recording

    def before(self, op: Op, step: Any, registers: list[Any]) -> None:
        """See `Observer.before`."""
        self._inside, self._rank = op, step.program.rank
        if not self._cut or isinstance(op, _COMPUTATIONS):
            self._begin()

    def after(self, op: Op, step: Any, registers: list[Any], sends: list[Any]) -> None:
        """See `Observer.after`."""
        if self._apart:
            self.end()
            if not self.parts or self.parts[-1].last is not op:
                self.parts.append(Part(_nothing, self._rank, op, op))
        self._inside = None

    def outside(self, play: Callable[[], Any]) -> None:
        """Note what is no kernel. It is not run now."""
        self.end()
        self.parts.append(Part(play, self._rank, self._inside, self._inside))

    def end(self) -> None:
        """End the graph that is being captured, if there is one."""
        graph, self._graph = self._graph, None
        if graph is not None:
            graph.end()
            self.num_graphs += 1
            told = self._cut or self._apart
            self.parts.append(Part(graph.replay, *((self._rank, self._first, self._last) if told else ())))

    def abandon(self) -> None:
        """End a capture that failed."""
        with suppress(RuntimeError):  # CUDA says once more that it did
            self.end()

    def buffers(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """A copy, made by a kernel, of what is to be sent: in memory that `free` gives to later sends."""
        self._begin()
        made = []
        for tensor in tensors:
            free = self._buffers.setdefault((tensor.shape, tensor.dtype), [])
            made.append(free.pop() if free else tensor.new_empty(tensor.shape))
            made[-1].copy_(tensor)
        return made

    def free(self, buffers: Sequence[Tensor]) -> None:
        """A send has been waited for."""
        for buffer in buffers:
            self._buffers[buffer.shape, buffer.dtype].append(buffer)

    def _begin(self) -> None:
        if self._graph is None:
            self._graph, self._first = self._new_graph(), self._inside
            self._graph.begin()
        self._last = self._inside

    # --- playing

    def play(self, observers: Mapping[int, Sequence[Any]]) -> Iterator[None]:
        """Do it all. Yields each time it has to wait.

        Args:
            observers: by rank: see `executor.Observer`. They are told of parts, and shown no values.
        """
        for part in self.parts:
            told = observers.get(part.rank, ()) if part.rank is not None else ()
            if part.first is not None:
                for observer in told:
                    observer.before(part.first, None, [])
            while part.play() is False:
                yield
            if part.last is not None:
                for observer in told:
                    observer.after(part.last, None, [], [])


def _nothing() -> None:
    """Of an action that does nothing."""


class TapedPort:
    """A port, as a run that is recorded sees it: transfers are made when the tape is played.

    `current` is the port of the step in which it is.
    """

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self.current: Port | None = None

    def send(self, tensors: list[Tensor]) -> Ticket:
        """See `Port.send`. What is sent is copied first: its own memory is the next value's when the tape says so."""
        buffers = self._tape.buffers(tensors)
        ticket = _TapedTicket(self._tape, buffers, buffers)
        self._tape.outside(lambda: ticket.post(self._port.send([*buffers])))
        return ticket

    def receive(self, into: list[Tensor]) -> Ticket:
        """See `Port.receive`."""
        kept, ticket = tuple(into), _TapedTicket(self._tape, into, ())
        self._tape.outside(lambda: ticket.post(self._port.receive([*kept])))
        return ticket

    @property
    def _port(self) -> Port:
        assert self.current is not None, "a tape is played in a step, which has ports"
        return self.current


class _TapedTicket:
    """A transfer of each step in which the tape is played."""

    def __init__(self, tape: Tape, tensors: list[Tensor], buffers: Sequence[Tensor]) -> None:
        self._tape, self.tensors, self._buffers = tape, tensors, buffers
        self._posted: Ticket | None = None

    def post(self, ticket: Ticket) -> None:
        """It is this one now."""
        self._posted = ticket

    def arrived(self) -> bool:
        """See `Ticket.arrived`."""
        self._tape.outside(self._arrived)
        return True

    def settle(self) -> None:
        """See `Ticket.settle`."""
        self._tape.outside(self._settle)
        self._tape.free(self._buffers)

    def _arrived(self) -> bool:
        assert self._posted is not None, "posted before it is waited for"
        return self._posted.arrived()

    def _settle(self) -> None:
        assert self._posted is not None, "posted before it is waited for"
        self._posted.settle()
        self._posted = None

"""A step on tape: its kernels as a few CUDA graphs, and what runs between them.

A tape observes a rank while it records. Nothing is computed then: kernels are captured, and transfers
and everything else that is not a kernel are noted, to run at their places whenever the tape is played. Ranks that share a
process are on one tape, transfers included, which are copies there: their whole step is one graph. Between processes a
transfer ends a graph, and the next computation begins another.

All graphs of a tape allocate from one pool, in the order in which they are played, so that values alive at
the same time do not share memory, as in a normal step: microbatches in flight need no copies, and the pool is as
large as a normal step's peak. If each kind of piece were recorded alone, every slot would have to be as large as its
largest value, or residuals would be copied.
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
    """Kernels captured once, and then launched together."""

    def begin(self) -> None:
        """Begin to capture the current stream's kernels instead of running them."""
        ...

    def end(self) -> None:
        """Complete the capture."""
        ...

    def replay(self) -> None:
        """Launch the kernels."""
        ...


class Part(NamedTuple):
    """One thing on a tape to play."""

    play: Callable[[], Any]  # returns False while it waits, and is called again
    rank: int | None = None  # whose actions these are; None if not observed
    first: Op | None = None
    last: Op | None = None


class Tape:
    """Records in one run, and plays any number of times.

    Args:
        new_graph: makes an empty graph.
        cut: do not capture transfers.
        apart: make each action a separate part, so that it can be timed.
    """

    def __init__(self, new_graph: Callable[[], Graph], *, cut: bool, apart: bool) -> None:
        self._new_graph, self._cut, self._apart = new_graph, cut, apart
        self._graph: Graph | None = None  # the one capturing now
        self._first: Op | None = None  # the first action in it
        self._last: Op | None = None  # and the last
        self._inside: Op | None = None  # the running action
        self._rank = 0
        self._buffers: dict[Any, list[Tensor]] = {}  # free send buffers, by shape and dtype
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
        """Note a function that is not a kernel; it does not run now."""
        self.end()
        self.parts.append(Part(play, self._rank, self._inside, self._inside))

    def end(self) -> None:
        """End the graph that is being captured, if any."""
        graph, self._graph = self._graph, None
        if graph is not None:
            graph.end()
            self.num_graphs += 1
            observed = self._cut or self._apart
            self.parts.append(Part(graph.replay, *((self._rank, self._first, self._last) if observed else ())))

    def abandon(self) -> None:
        """End a failed capture."""
        with suppress(RuntimeError):  # CUDA reports the failure again
            self.end()

    def buffers(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copy tensors to be sent, by a kernel, into memory that `free` returns for later sends."""
        self._begin()
        made = []
        for tensor in tensors:
            free = self._buffers.setdefault((tensor.shape, tensor.dtype), [])
            made.append(free.pop() if free else tensor.new_empty(tensor.shape))
            made[-1].copy_(tensor)
        return made

    def free(self, buffers: Sequence[Tensor]) -> None:
        """Return a settled send's buffers."""
        for buffer in buffers:
            self._buffers[buffer.shape, buffer.dtype].append(buffer)

    def _begin(self) -> None:
        if self._graph is None:
            self._graph, self._first = self._new_graph(), self._inside
            self._graph.begin()
        self._last = self._inside

    # --- playing

    def play(self, observers: Mapping[int, Sequence[Any]]) -> Iterator[None]:
        """Play all parts; yield each time one has to wait.

        Args:
            observers: by rank, see `executor.Observer`. They see parts, but no values.
        """
        for part in self.parts:
            watching = observers.get(part.rank, ()) if part.rank is not None else ()
            if part.first is not None:
                for observer in watching:
                    observer.before(part.first, None, [])
            while part.play() is False:
                yield
            if part.last is not None:
                for observer in watching:
                    observer.after(part.last, None, [], [])


def _nothing() -> None:
    """Play an action that does nothing."""


class TapedPort:
    """The port that a run being recorded sees: its transfers happen when the tape is played.

    `current` is the port of the step that plays.
    """

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self.current: Port | None = None

    def send(self, tensors: list[Tensor]) -> Ticket:
        """See `Port.send`. The tensors are copied first: the tape reuses their memory."""
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
        assert self.current is not None, "a tape is played within a step, which has ports"
        return self.current


class _TapedTicket:
    """The ticket of a transfer in every step that plays the tape."""

    def __init__(self, tape: Tape, tensors: list[Tensor], buffers: Sequence[Tensor]) -> None:
        self._tape, self.tensors, self._buffers = tape, tensors, buffers
        self._posted: Ticket | None = None

    def post(self, ticket: Ticket) -> None:
        """Set the current step's ticket."""
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

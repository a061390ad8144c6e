"""Walk a schedule at a given pace to find when each action runs. The core of the simulator.

Ranks wait for each other as in `order.py`; here actions take time. All ranks take one step at a time, together: a
step costs some fifteen numpy calls, whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autofunc.schedule.laws.network import Crossing, Indices, Network, by_action
from autofunc.schedule.laws.order import check_local_order, check_order

Times = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Pace:
    """How long actions and transfers take on a walk."""

    duration: Times  # per action of the flat table
    transfer: Times  # per crossing: how long a value occupies the wire between two ranks
    latency: float  # from the end of the transfer until the value can be read
    exposed: Times  # per crossing: how long a send holds up its rank
    before: Times | None = None  # per action of the flat table: time its rank is busy first, after its inputs arrived


Rows = tuple[Times, ...]
"""Times of actions, one array per rank."""

_APART = 8
"""Unused entries between the rows of two ranks, and between two crossings, in arrays that all ranks work on at once:
without them, rows of 2**n actions would lie at addresses that share few cache lines."""


def walk(network: Network, pace: Pace) -> tuple[Rows, Rows, Rows]:
    """Find when each action starts and ends, and when all it reads has arrived (-inf if it reads nothing).

    Raises:
        ScheduleError: as `check_order` does.
    """
    check_local_order(network)
    return _Walk(network, pace).run()


class _Walk:
    """The state of one walk: which messages actions read and send, and when each message arrives.

    A message is a crossing and a microbatch. A rank that cannot go on takes a step that ends at infinity, and repeats it
    later, which overwrites what it wrote.
    """

    def __init__(self, network: Network, pace: Pace) -> None:
        self.network, self.pace = network, pace
        crossings, placement = network.crossings, network.schedule.placement
        lengths = np.diff(network.first)
        # per rank, where its row begins and ends in the padded arrays
        self.first = network.first[:-1] + _APART * np.arange(len(lengths))
        self.stop = self.first + lengths
        count = int(self.stop[-1])
        self.duration = self._apart(pace.duration)
        self.before = None if pace.before is None else self._apart(pace.before)
        stride = network.schedule.num_microbatches + _APART
        nothing, nowhere = len(crossings) * stride, len(crossings) * stride + 1
        numbers = np.arange(nothing, dtype=np.int32).reshape(len(crossings), stride)

        def messages(which: Callable[[Crossing], tuple[Indices, int]]) -> Iterator[tuple[Indices, Indices]]:
            """Yield, by crossing, positions of actions in the padded arrays and their messages."""
            for crossing, number in zip(crossings, numbers, strict=True):
                actions, stage = which(crossing)
                moved = np.where(actions < 0, actions, actions + np.int32(_APART * placement[stage]))
                yield moved, number[: len(moved)]

        self.incoming = by_action(messages(lambda each: (each.bundle.reader, each.target)), count, nothing)
        self.outgoing = by_action(messages(lambda each: (each.send, each.source)), count, nowhere)
        self.arrival = np.full(nowhere + 1, np.inf)
        self.arrival[nothing] = -np.inf
        self.receiving = None
        if network.schedule.is_lowered:
            (self.receiving,) = by_action(messages(lambda each: (each.receive, each.target)), count, nowhere)
            self.posted = self.arrival.copy()  # the earliest arrival that the posting of each receive allows
        self.wires = _Wires(network, pace, stride) if pace.transfer.any() or pace.exposed.any() else None

    def run(self) -> tuple[Rows, Rows, Rows]:
        """Step all ranks until their rows are done."""
        start, end, arrived = (np.zeros(len(self.duration)) for _ in range(3))
        position, stop = self.first, self.stop
        clock = np.zeros(len(position))
        while (left := position < stop).any():
            position, stop, clock = position[left], stop[left], clock[left]
            for _ in range(int((stop - position).min())):  # no rank ends within this many steps
                ready = self._ready(position)
                goes = ready < np.inf
                if not goes.any():
                    check_order(self.network)  # raises, naming who waits for whom
                    raise AssertionError("the walk is stuck, but the schedule can run")
                begin = np.maximum(clock, ready)
                if self.before is not None:
                    begin += self.before.take(position)
                start[position] = begin
                end[position] = finish = begin + self.duration.take(position)
                arrived[position] = ready
                np.copyto(clock, self._send(position, begin, finish), where=goes)
                position += goes
        return self._by_rank(start), self._by_rank(end), self._by_rank(arrived)

    def _apart(self, values: Times) -> Times:
        """Copy values of the flat table into the padded layout."""
        laid = np.zeros(int(self.stop[-1]))
        for row, first, stop in zip(self.network.by_rank(values), self.first, self.stop, strict=True):
            laid[first:stop] = row
        return laid

    def _by_rank(self, times: Times) -> Rows:
        return tuple(times[first:stop] for first, stop in zip(self.first, self.stop, strict=True))

    def _ready(self, position: npt.NDArray[np.int64]) -> Times:
        """Find when all that these actions read has arrived; infinity if not known yet."""
        ready: Times | None = None
        for slot in self.incoming:
            message = slot.take(position)
            arrived = self.arrival.take(message)
            if self.receiving is not None:
                np.maximum(arrived, self.posted.take(message), out=arrived)
            ready = arrived if ready is None else np.maximum(ready, arrived, out=ready)
        assert ready is not None
        return ready

    def _send(self, position: npt.NDArray[np.int64], begin: Times, finish: Times) -> Times:
        """Start the transfers of what these actions make or send; return when their ranks can go on.

        In compute form a value leaves at the end of its action. A SEND starts its transfer as it begins.
        """
        latency = self.pace.latency
        leaves = finish if self.receiving is None else begin
        for slot in self.outgoing:
            message = slot.take(position)
            if self.wires is None:
                self.arrival[message] = leaves + latency
            else:
                left, held = self.wires.send(message, leaves)
                self.arrival[message] = left + latency
                leaves, finish = leaves + held, finish + held
        if self.receiving is not None:
            message = self.receiving.take(position)
            transfer = 0.0 if self.wires is None else self.wires.transfer.take(self.wires.crossing(message))
            self.posted[message] = begin + transfer + latency
        return finish


class _Wires:
    """One wire for each directed pair of ranks, on which one value travels at a time."""

    def __init__(self, network: Network, pace: Pace, stride: int) -> None:
        placement = network.schedule.placement
        ends = [(placement[crossing.source], placement[crossing.target]) for crossing in network.crossings]
        number = {pair: index for index, pair in enumerate(dict.fromkeys(ends))}
        self._stride = stride  # from the messages of one crossing to those of the next
        # crossings between the same two ranks share their wire; one more wire for actions that send nothing
        self._wire = np.array([*(number[pair] for pair in ends), len(number)])
        self._free = np.zeros(len(number) + 1)
        self.transfer = np.append(pace.transfer, 0.0)
        self._exposed = np.append(pace.exposed, 0.0)

    def crossing(self, message: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Return the crossings of messages; the number of crossings for "no message"."""
        return np.minimum(message // self._stride, len(self.transfer) - 1)

    def send(self, message: npt.NDArray[np.int32], begin: Times) -> tuple[Times, Times]:
        """Find when messages sent at `begin` (infinity: never) have left, and how long they hold up their ranks."""
        crossing = self.crossing(message)
        wire = self._wire.take(crossing)
        free = self._free.take(wire)
        leaves = np.maximum(begin, free) + self.transfer.take(crossing)
        self._free[wire] = np.where(leaves < np.inf, leaves, free)
        self._free[-1] = 0.0
        return leaves, self._exposed.take(crossing)

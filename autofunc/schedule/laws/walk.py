"""Walk a schedule in an order in which it can really run: the shared heart of the validator and the simulator.

Each rank runs its row in order. An action runs once every value it reads is on its rank. In compute form a value travels
as soon as it is made; in lowered form once both its SEND and its RECV have been posted. Posting never blocks, so this is
exactly execution with zero buffering; where it is said that sends do, one begins only once its RECV has been posted, which
keeps its rank as long. All ranks take one step at a time, together: the cost of a step is that of a dozen
numpy calls, whatever the number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autofunc.errors import ScheduleError
from autofunc.schedule.effects import Token
from autofunc.schedule.ir import Kind
from autofunc.schedule.laws.error_grid import grid
from autofunc.schedule.laws.network import Crossing, Network
from autofunc.shown import shown

Times = npt.NDArray[np.float64]

_MOST_REASONS = 4
"""Ranks of a circle that are named."""


@dataclass(frozen=True)
class Pace:
    """How long things take on a walk. Zeros when only the order matters."""

    duration: Times  # per action of the flat table
    transfer: Times  # per crossing: how long a value occupies the wire between two ranks
    latency: float  # from then until it can be read
    exposed: Times  # per crossing: how long a send keeps its rank from going on


def at_no_time(network: Network) -> Pace:
    """A pace at which only the order matters."""
    free = np.zeros(len(network.crossings))
    return Pace(np.zeros(len(network.table)), free, 0.0, free)


def walk(network: Network, pace: Pace, sends_block: bool = False) -> tuple[Times, Times, Times]:
    """When each action of the flat table starts and ends, and when all it reads has arrived.

    Args:
        network: who waits for whom.
        pace: how long things take.
        sends_block: whether a SEND waits until its RECV has been posted; only of a lowered schedule.

    Raises:
        ScheduleError: when a value is not made before it is read on its own rank, or no rank can go on. The message holds
            the grid with the action marked.
    """
    _check_local_order(network)
    return _Walk(network, pace, sends_block and network.schedule.is_lowered).run()


class _Walk:
    """The state of one walk: numbers of messages, and when each arrives."""

    def __init__(self, network: Network, pace: Pace, sends_block: bool) -> None:
        self.network, self.pace, self.sends_block = network, pace, sends_block
        crossings, lowered = network.crossings, network.schedule.is_lowered
        count = len(network.table)
        self.num_messages = len(crossings) * network.schedule.num_microbatches
        readers = _together([crossing.bundle.reader for crossing in crossings])
        self.incoming = _slots(readers, count, padding=self.num_messages)
        self.outgoing = _slots(_together([crossing.send for crossing in crossings]), count, padding=self.num_messages + 1)
        receives = _together([crossing.receive for crossing in crossings])
        self.receiving = _slots(receives, count, padding=self.num_messages + 1) if lowered else None
        self.arrival = np.full(self.num_messages + 2, np.inf)
        self.arrival[-2] = -np.inf  # what an action without incoming messages waits for
        self.posted = np.full(self.num_messages + 2, np.inf)
        self.posted[-2:] = -np.inf
        placement = network.schedule.placement
        ends = [(placement[crossing.source], placement[crossing.target]) for crossing in crossings]
        number = {pair: index for index, pair in enumerate(dict.fromkeys(ends))}
        # crossings between the same two ranks share their wire; one more for actions that send nothing
        self.wire = np.array([*(number[pair] for pair in ends), len(number)])
        self.wire_free = np.zeros(len(number) + 1)
        self.transfer = np.append(pace.transfer, 0.0)
        self.exposed = np.append(pace.exposed, 0.0)

    def run(self) -> tuple[Times, Times, Times]:
        """Step all ranks until their rows are done."""
        network, duration = self.network, self.pace.duration
        start, end, arrived = (np.zeros(len(network.table)) for _ in range(3))
        clock = np.zeros(len(network.first) - 1)
        position, stop = network.first[:-1].copy(), network.first[1:]
        ranks = np.flatnonzero(position < stop)
        while len(ranks):
            here = position[ranks]
            ready = self._ready(here)
            can = ready < np.inf
            if not can.any():
                raise self._stuck({int(rank): int(position[rank]) for rank in ranks})
            going, acting = ranks[can], here[can]
            begin = np.maximum(clock[going], ready[can])
            finish = begin + duration[acting]
            start[acting], end[acting], arrived[acting] = begin, finish, ready[can]
            clock[going] = self._send(acting, finish)
            if self.receiving is not None:
                self.posted[self.receiving[0, acting]] = finish
                self.posted[-1] = -np.inf
            position[going] += 1
            ranks = ranks[position[ranks] < stop[ranks]]
        return start, end, arrived

    def _stuck(self, positions: dict[int, int]) -> ScheduleError:
        """Of the ranks that are left, those that wait for each other in a circle.

        Args:
            positions: by rank that is left, the action at which it waits.
        """
        seen: dict[int, tuple[int, Token, int]] = {}  # by rank, in the order in which they wait for each other
        placement = self.network.schedule.placement
        rank = next(iter(positions))
        while rank in positions and rank not in seen:
            flat = positions[rank]
            crossing, microbatch, is_sender = self._missing(flat)
            giver = crossing.receive if is_sender else crossing.send
            seen[rank] = flat, crossing.bundle.of(microbatch), int(giver[microbatch])
            rank = placement[crossing.target if is_sender else crossing.source]
        waiting = list(seen.values())[list(seen).index(rank) if rank in seen else 0 :]
        if rank in seen:  # a circle is told from a send on that blocks, if there is one
            begin = next((number for number, each in enumerate(waiting) if _blocks(self.network, each[0], each[2])), 0)
            waiting = waiting[begin:] + waiting[:begin]
        return _cannot_go_on(self.network, waiting, len(positions))

    def _missing(self, flat: int) -> tuple[Crossing, int, bool]:
        """Of what an action waits for: its crossing and microbatch, and whether it is a send that waits for its receive."""
        messages = self.incoming[:, flat]
        missing = messages[self.arrival[messages] == np.inf]
        message = int(missing[0] if len(missing) else self.outgoing[0, flat])
        number, microbatch = divmod(message, self.network.schedule.num_microbatches)
        return self.network.crossings[number], microbatch, not len(missing)

    def _ready(self, here: npt.NDArray[np.int64]) -> Times:
        """When all that these actions read has arrived."""
        ready = np.full(len(here), -np.inf)
        for row in self.incoming:
            message = row[here]
            arrived = self.arrival[message]
            if self.receiving is not None:
                crossing = np.minimum(message // self.network.schedule.num_microbatches, len(self.network.crossings))
                arrived = np.maximum(arrived, self.posted[message] + self.transfer[crossing] + self.pace.latency)
            ready = np.maximum(ready, arrived)
        if self.sends_block:
            ready = np.maximum(ready, self.posted[self.outgoing[0, here]])  # lowered, an action sends one value
        return ready

    def _send(self, acting: npt.NDArray[np.int64], finish: Times) -> Times:
        """Start the transfers of what these actions made or send; returns when their ranks can go on."""
        for row in self.outgoing:
            message = row[acting]
            crossing = np.minimum(message // self.network.schedule.num_microbatches, len(self.network.crossings))
            wire = self.wire[crossing]
            leaves = np.maximum(finish, self.wire_free[wire]) + self.transfer[crossing]
            self.wire_free[wire] = leaves
            self.wire_free[-1] = 0.0
            self.arrival[message] = leaves + self.pace.latency
            finish = finish + self.exposed[crossing]
        return finish


def _together(parts: list[npt.NDArray[np.int32]]) -> npt.NDArray[np.int32]:
    return np.concatenate(parts) if parts else np.empty(0, np.int32)


def _slots(actions: npt.NDArray[np.int32], num_actions: int, padding: int) -> npt.NDArray[np.int32]:
    """Messages by action: int32 array of shape (most messages of one action, at least 1; number of actions)."""
    message = np.flatnonzero(actions >= 0)
    action = actions[message]
    counts = np.bincount(action, minlength=1)
    slots = np.full((max(int(counts.max()), 1), num_actions), padding, np.int32)
    if counts.max() <= 1:
        slots[0, action] = message
        return slots
    order = np.argsort(action, kind="stable")
    begins = np.concatenate(([0], np.cumsum(counts)))[action[order]]
    slots[np.arange(len(order)) - begins, action[order]] = message[order]
    return slots


def _check_local_order(network: Network) -> None:
    """Values that stay on a rank: made before they are read; values that travel: made before sent, received before read."""
    pairs = [(bundle.maker, bundle.reader, bundle) for bundle in network.local]
    if network.schedule.is_lowered:
        pairs += [(crossing.bundle.maker, crossing.send, crossing.bundle) for crossing in network.crossings]
        pairs += [(crossing.receive, crossing.bundle.reader, crossing.bundle) for crossing in network.crossings]
    if not pairs:
        return
    maker, reader = _together([pair[0] for pair in pairs]), _together([pair[1] for pair in pairs])
    wrong = np.flatnonzero((reader >= 0) & ((maker < 0) | (maker > reader)))
    if not len(wrong):
        return
    first = wrong[np.argmin(reader[wrong])]
    bundle = pairs[first // network.schedule.num_microbatches][2]
    token = bundle.of(int(first % network.schedule.num_microbatches))
    raise _cannot_go_on(network, [(int(reader[first]), token, int(maker[first]))])


def _cannot_go_on(network: Network, waiting: list[tuple[int, Token, int]], num_ranks: int = 1) -> ScheduleError:
    """The error for actions that never start, each with the value it needs and the action that should give or take it.

    They wait for each other in a circle, or the last for what no action gives. Of all ranks `num_ranks` wait.
    """
    reasons = []
    for flat, token, giver in waiting[:_MOST_REASONS]:
        by_whom = "which no action makes" if giver < 0 else f"which {_giver(network, giver)}"
        needs = "blocks until somebody receives the" if _blocks(network, flat, giver) else "needs the"
        reasons.append(f"{network.describe(flat)}: {needs} {token}, {by_whom}")
    if num_ranks > len(reasons):
        reasons.append(f"and {num_ranks - len(reasons):,} more ranks wait")
    return ScheduleError(
        f"schedule {shown(network.schedule.name)} cannot go on: {'; '.join(reasons)}\n"
        + grid(network.schedule, network.locate(waiting[0][0]))
    )


def _blocks(network: Network, flat: int, giver: int) -> bool:
    """Whether an action is a send that waits for its receive."""
    return giver >= 0 and Kind(network.table[flat, 1]).is_send and Kind(network.table[giver, 1]).is_receive


def _giver(network: Network, flat: int) -> str:
    rank, position = network.locate(flat)
    action = network.schedule[rank][position]
    verb = "sends" if action.kind.is_send else "receives" if action.kind.is_receive else "makes"
    return f"{action} {verb} at position {position} of rank {rank}"

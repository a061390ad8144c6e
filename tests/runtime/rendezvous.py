"""Lowered schedules run under the rules of transports that are stricter than memory: who waits for whom, for ever?

Names and integers only, one action at a time, and written without the validator's arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from autofunc.schedule import Schedule, settled_sends
from autofunc.schedule.effects import Token, carried_by, flow_of

Pair = tuple[int, int]
"""(rank that sends, rank that receives); of rules for both ways, the lower rank first."""


class Rules(NamedTuple):
    """What a transport demands. The k-th transfer of a pair at one end is always the k-th at the other."""

    both_ways: bool = False  # one communicator for both directions, rather than one for each
    connected: bool = True  # else the first post on a communicator waits for the first at the other end
    send_waits: bool = False  # until its receive is posted
    host_waits: bool = False  # until the transfer is done, at each post


class Post(NamedTuple):
    """A send or receive."""

    message: object
    source: int
    target: int
    is_send: bool


class Wait(NamedTuple):
    """For transfers to be done, before the rank goes on."""

    messages: tuple[object, ...]


Step = Post | Wait


def steps_of(schedule: Schedule) -> list[list[Step]]:
    """By rank: what it posts, and what it waits for, as the runtime does: at readers, for what was read and settled."""
    flow, settled, placement = flow_of(schedule, None), settled_sends(schedule), schedule.placement
    rows: list[list[Step]] = []
    for rank, row in enumerate(schedule):
        steps: list[Step] = []
        sent: dict[int, Token] = {}
        in_flight: set[Token] = set()
        for position, action in enumerate(row):
            if action.kind.is_send:
                sent[position] = carried_by(action)
                steps.append(Post(carried_by(action), rank, placement[action.peer], True))
            elif action.kind.is_receive:
                in_flight.add(carried_by(action))
                steps.append(Post(carried_by(action), placement[action.peer], rank, False))
            elif action.kind.is_compute:
                arriving = [token for token in flow.effect(action).reads if token in in_flight]
                in_flight.difference_update(arriving)
                proven = [sent.pop(number) for number in settled[rank].get(position, ())]
                if arriving or proven:
                    steps.append(Wait((*arriving, *proven)))
        rows.append([*steps, Wait(tuple(sent.values()))])
    return rows


@dataclass
class _Communicator:
    """What has been posted at both ends, in order."""

    posted: dict[int, list[object]] = field(default_factory=dict)  # by rank
    done: int = 0  # transfers, the first ones

    def post(self, rank: int, message: object) -> list[object]:
        """Returns the messages that are done by it.

        Raises:
            AssertionError: when the ends disagree, and would take one message for another.
        """
        self.posted.setdefault(rank, []).append(message)
        if len(self.posted) < 2:
            return []
        one, other = self.posted.values()
        ready = min(len(one), len(other))
        assert one[:ready] == other[:ready], f"{one[self.done : ready]} meet {other[self.done : ready]}"
        found, self.done = one[self.done : ready], ready
        return found


def stuck(rows: Sequence[Sequence[Step]], rules: Rules) -> list[int]:
    """The ranks that never end; none when all is well.

    Raises:
        AssertionError: when the two ends of a communicator disagree on the order.
    """
    communicators: dict[Pair, _Communicator] = {}
    done: set[object] = set()
    receiving: set[object] = set()
    position, entered = [0] * len(rows), [False] * len(rows)
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(rows):
            while position[rank] < len(row):
                step = row[position[rank]]
                if isinstance(step, Wait):
                    if not done.issuperset(step.messages):
                        break
                else:
                    ends = sorted((step.source, step.target)) if rules.both_ways else (step.source, step.target)
                    communicator = communicators.setdefault((ends[0], ends[1]), _Communicator())
                    if not entered[rank]:
                        entered[rank] = moved = True
                        done.update(communicator.post(rank, step.message))
                        if not step.is_send:
                            receiving.add(step.message)
                    if not rules.connected and len(communicator.posted) < 2:
                        break
                    if rules.send_waits and step.is_send and step.message not in receiving:
                        break
                    if rules.host_waits and step.message not in done:
                        break
                position[rank], entered[rank], moved = position[rank] + 1, False, True
    return [rank for rank, row in enumerate(rows) if position[rank] < len(row)]

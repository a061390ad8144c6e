"""Walk a schedule in an order in which it can really run: the shared heart of the validator and the simulator.

Each rank runs its row in order. An action runs once every value it reads is on its rank. In compute form a value is on
the reader's rank as soon as it is made; in lowered form it arrives when both its SEND and its RECV have been posted.
Posting never blocks, so this is exactly execution with zero buffering.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from autofunc.errors import ScheduleError
from autofunc.schedule.effects import Activation, Cotangent, Dataflow, Effect, Token
from autofunc.schedule.grid import grid
from autofunc.schedule.ir import Action, Schedule


class Step(NamedTuple):
    """One action at its place."""

    rank: int
    position: int
    action: Action
    effect: Effect


class _Channel:
    """Values on one directed edge: the k-th send meets the k-th receive."""

    def __init__(self) -> None:
        self.sent: deque[Step] = deque()
        self.posted: deque[Step] = deque()


def walk(schedule: Schedule, flow: Dataflow) -> Iterator[Step]:
    """Yield every action in an order that respects rows and dependencies.

    Raises:
        ScheduleError: when no rank can go on, when the two ends of an edge disagree on the order, or when a value is left
            over at the end. The message holds the grid with the action marked.
    """
    live: set[tuple[int, Token]] = set()
    waiting: dict[tuple[int, Token], int] = {}
    channels: dict[tuple[int, int], _Channel] = {}
    positions = [0] * schedule.num_ranks
    rows = [list(row) for row in schedule]
    runnable = deque(range(schedule.num_ranks))

    def arrive(rank: int, token: Token) -> None:
        live.add((rank, token))
        if (rank, token) in waiting:
            runnable.append(waiting.pop((rank, token)))

    while runnable:
        rank = runnable.popleft()
        while positions[rank] < len(rows[rank]):
            action = rows[rank][positions[rank]]
            effect = flow.effect(action)
            missing = next((token for token in effect.reads if (rank, token) not in live), None)
            if missing is not None:
                waiting[rank, missing] = rank
                break
            step = Step(rank, positions[rank], action, effect)
            yield step
            live.difference_update((rank, token) for token in effect.reads)
            if action.kind.is_compute:
                for token in effect.writes:
                    arrive(_home(schedule, rank, token), token)
            else:
                _meet(schedule, channels, step, arrive)
            positions[rank] += 1

    _check_finished(schedule, flow, positions, waiting)
    _check_nothing_left(schedule, live, channels)


def _home(schedule: Schedule, rank: int, token: Token) -> int:
    """The rank on which a value is when it has been made: its reader's in compute form, its maker's when lowered."""
    if schedule.is_lowered or not isinstance(token, (Activation, Cotangent)):
        return rank
    return schedule.placement[token[1]]


def _meet(
    schedule: Schedule,
    channels: dict[tuple[int, int], _Channel],
    step: Step,
    arrive: Callable[[int, Token], None],
) -> None:
    """Post a send or a receive; when both ends of a transfer are posted, its value arrives."""
    action = step.action
    ends = (action.stage, action.peer) if action.kind.is_send else (action.peer, action.stage)
    channel = channels.setdefault(ends, _Channel())
    (channel.sent if action.kind.is_send else channel.posted).append(step)
    if not (channel.sent and channel.posted):
        return
    send, receive = channel.sent.popleft(), channel.posted.popleft()
    if send.action.microbatch != receive.action.microbatch:
        raise ScheduleError(
            f"the two ends of the edge from stage {ends[0]} to stage {ends[1]} disagree on the order: rank {send.rank} "
            f"sends {send.action} (position {send.position}) where rank {receive.rank} receives {receive.action} "
            f"(position {receive.position})\n{grid(schedule, (receive.rank, receive.position))}"
        )
    arrive(receive.rank, receive.effect.writes[0])


def _check_finished(
    schedule: Schedule, flow: Dataflow, positions: list[int], waiting: dict[tuple[int, Token], int]
) -> None:
    if not waiting:
        return
    stuck = []
    for rank, token in sorted(waiting, key=lambda key: key[0]):
        action = schedule[rank][positions[rank]]
        reason = _why_missing(schedule, flow, rank, token)
        stuck.append(f"rank {rank}, position {positions[rank]}, {action}: needs the {token}, {reason}")
    first = min(rank for rank, _ in waiting)
    raise ScheduleError(
        f"schedule {schedule.name} cannot go on: " + "; ".join(stuck) + "\n" + grid(schedule, (first, positions[first]))
    )


def _why_missing(schedule: Schedule, flow: Dataflow, rank: int, token: Token) -> str:
    """Who should have made a value that a rank waits for."""
    local_only = schedule.is_lowered or not isinstance(token, (Activation, Cotangent))
    for maker, row in enumerate(schedule):
        for position, action in enumerate(row):
            if token in flow.effect(action).writes and (maker == rank or not local_only):
                if action.kind.is_receive:
                    return f"which {action} at position {position} receives, but whose send is not posted"
                return f"which {action} makes at position {position} of rank {maker}"
    return f"which no action {f'of rank {rank} ' if local_only else ''}makes"


def _check_nothing_left(
    schedule: Schedule, live: set[tuple[int, Token]], channels: dict[tuple[int, int], _Channel]
) -> None:
    for channel in channels.values():
        for step in (*channel.sent, *channel.posted):
            other = "receive" if step.action.kind.is_send else "send"
            raise ScheduleError(
                f"rank {step.rank}, position {step.position}: {step.action} has no {other} at the other end\n"
                + grid(schedule, (step.rank, step.position))
            )
    if live:
        rank, token = min(live)
        raise ScheduleError(f"rank {rank}: left over at the end: the {token}\n{grid(schedule)}")

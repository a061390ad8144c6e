"""Lowering: from computations to the full program, with sends, receives, and the gathering of sharded parameters.

A send is posted right after the action that makes its value. A receive is posted `prefetch` computations before the
action that reads it, so that the transfer overlaps what runs in between. On each directed edge the receives are posted
in the order of the sends, because a channel keeps its order; a receive only posts, so nothing waits behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

from autofunc.errors import ScheduleError, one_of
from autofunc.schedule.effects import Activation, Cotangent, Dataflow, Edge, flow_of
from autofunc.schedule.ir import OVERLAPPED, Action, Kind, Row, Schedule, as_table
from autofunc.schedule.lowering.sharding import Unshard, place

Channel = tuple[int, int]
"""(sending stage, receiving stage): values on one channel arrive in the order in which they were sent."""

Gaps = list[list[Action]]
"""Per position of a row, what is inserted there."""


def lower(
    schedule: Schedule,
    edges: Sequence[Edge] | None = None,
    prefetch: int = 1,
    unshard: Unshard | str = Unshard.NEVER,
    unshard_ahead: int = 1,
    reduce_grads: bool = False,
    keep_overlapped: bool = False,
    merge: bool = True,
) -> Schedule:
    """Add SEND and RECV actions for every edge between stages on different ranks, and the sharding actions asked for.

    I and W of one microbatch become B where they are adjacent and no input gradient leaves the rank in between: a full
    backward is cheaper than its two parts, but a gradient that others wait for should not wait for W.

    Args:
        schedule: in compute form; a lowered one is lowered anew.
        edges: connections between stages; a chain by default.
        prefetch: how many computations before its reader a receive is posted; 0 posts it right before.
        unshard: how often a stage's sharded parameters are gathered: "never", "once" (a step) or "each_use".
        unshard_ahead: how many computations before their first use gathering begins.
        reduce_grads: whether each stage's gradients are summed over data parallel ranks after its last backward; they are
            always where parameters are sharded.
        keep_overlapped: keep overlapped pairs together, with what they send after both, for a runtime that runs them at
            once (torch's takes a function for it). Otherwise their parts run one after the other, each with its sends.
        merge: False leaves every I and W as it is.

    Raises:
        ScheduleError: for arguments that do not exist, and edges that do not fit.
    """
    for name, distance in (("prefetch", prefetch), ("unshard_ahead", unshard_ahead)):
        if distance < 0:
            raise ScheduleError(f"lower: {name}={distance}, expected 0 or more")
    try:
        unshard = Unshard(unshard)
    except ValueError as error:
        raise ScheduleError(f"lower: unshard={unshard!r}; {one_of(unshard, [kind.value for kind in Unshard])}") from error
    flow = flow_of(schedule, edges)
    schedule = merge_backward(schedule.compute_form(), flow) if merge else schedule.compute_form()
    if not keep_overlapped:
        schedule = schedule.without_overlap()
    before, after = _transfers(schedule, flow, prefetch)
    rows = []
    for rank, row in enumerate(schedule):
        gather, release = place(row, unshard, unshard_ahead, reduce_grads)
        rows.append(Row(as_table(_inserted(row, (gather, before[rank]), (after[rank], release)))))
    return Schedule(schedule.name, schedule.placement, schedule.num_microbatches, tuple(rows))


def merge_backward(schedule: Schedule, flow: Dataflow) -> Schedule:
    """Make one B of each adjacent I and W between which no input gradient leaves the rank."""
    placement = schedule.placement
    rows = []
    for rank, row in enumerate(schedule):
        actions: list[Action] = []
        for action in row:
            previous = actions[-1] if actions else None
            if (
                action.kind is Kind.W
                and previous == Action(action.stage, Kind.I, action.microbatch)
                and all(placement[edge.producer] == rank for edge in flow.inputs(action.stage) if edge.needs_grad)
            ):
                actions[-1] = Action(action.stage, Kind.B, action.microbatch)
            else:
                actions.append(action)
        rows.append(row if len(actions) == len(row) else Row(as_table(actions)))
    return Schedule(schedule.name, placement, schedule.num_microbatches, tuple(rows))


def _transfers(schedule: Schedule, flow: Dataflow, prefetch: int) -> tuple[list[Gaps], list[Gaps]]:
    """Receives to post before each computation of each rank, and sends to post after it."""
    placement = schedule.placement
    sends: dict[Channel, list[int]] = {}  # microbatches in the order in which each channel carries them
    readers: dict[tuple[Channel, int], int] = {}  # (channel, microbatch) -> position of the reader in its rank's row
    after: list[Gaps] = [[[] for _ in row] for row in schedule]
    for rank, row in enumerate(schedule):
        for position, action in enumerate(row):
            effect = flow.effect(action)
            for token in effect.writes:
                if isinstance(token, (Activation, Cotangent)) and placement[token[1]] != rank:
                    kind = Kind.SEND_F if isinstance(token, Activation) else Kind.SEND_B
                    after[rank][position].append(Action(token[0], kind, token.microbatch, token[1]))
                    sends.setdefault((token[0], token[1]), []).append(token.microbatch)
            for token in effect.reads:
                if isinstance(token, (Activation, Cotangent)) and placement[token[0]] != rank:
                    readers[(token[0], token[1]), token.microbatch] = position

    before: list[Gaps] = [[[] for _ in row] for row in schedule]
    for (sender, receiver), microbatches in sends.items():
        rank = placement[receiver]
        kind = Kind.RECV_F if sender < receiver else Kind.RECV_B
        latest = len(before[rank]) - 1
        for microbatch in reversed(microbatches):
            latest = min(latest, readers.get(((sender, receiver), microbatch), latest))
            before[rank][max(latest - prefetch, 0)].append(Action(receiver, kind, microbatch, sender))
    for gaps in before:
        for gap in gaps:
            gap.reverse()  # collected from the last send to the first
    return before, after


def _inserted(row: Row, before: tuple[Gaps, ...], after: tuple[Gaps, ...]) -> list[Action]:
    """The row with everything in its place; an overlapped forward and its backward stay together."""
    actions: list[Action] = []
    held_back: list[Action] = []
    computations = list(row)
    for position, action in enumerate(computations):
        overlapped = action.peer == OVERLAPPED
        for gaps in before:
            if not (position and computations[position - 1].peer == OVERLAPPED):
                actions += gaps[position] + (gaps[position + 1] if overlapped else [])
        actions.append(action)
        inserted = [each for gaps in after for each in gaps[position]]
        if overlapped:
            held_back = inserted
        else:
            actions += held_back + inserted
            held_back = []
    return actions

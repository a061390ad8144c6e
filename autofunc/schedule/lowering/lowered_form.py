"""Lowering: from computations to the full program, with sends, receives, and the gathering of sharded parameters."""

from __future__ import annotations

from collections.abc import Sequence

from autofunc.errors import ScheduleError, one_of
from autofunc.schedule.effects import Dataflow, Edge, flow_of
from autofunc.schedule.ir import Action, Kind, Row, Schedule, as_table
from autofunc.schedule.lowering.blocking_sends import receive_before_blocking_sends
from autofunc.schedule.lowering.gaps import insert
from autofunc.schedule.lowering.sharding import Unshard, sharding_actions
from autofunc.schedule.lowering.transfers import transfer_actions


def lower(
    schedule: Schedule,
    edges: Sequence[Edge] | None = None,
    receive_ahead: int = 1,
    unshard: Unshard | str = Unshard.NEVER,
    unshard_ahead: int = 1,
    reduce_grads: bool = False,
    keep_overlapped: bool = False,
    merge: bool = True,
    sends_block: bool = False,
) -> Schedule:
    """Add SEND and RECV actions for every edge between stages on different ranks, and the sharding actions asked for.

    I and W of one microbatch become B where they are adjacent and no input gradient leaves the rank in between: a full
    backward is cheaper than its two parts, but a gradient that others wait for should not wait for W.

    Args:
        schedule: in compute form; a lowered one is lowered again from its compute form.
        edges: connections between stages; a chain by default.
        receive_ahead: how many computations before its reader a receive is posted; 0 posts it right before.
        unshard: how often a stage's sharded parameters are gathered: "never", "once" (a step) or "each_use".
        unshard_ahead: how many computations before their first use gathering begins.
        reduce_grads: sum each stage's gradients over the data-parallel ranks after its last backward; always done
            if parameters are sharded.
        keep_overlapped: keep overlapped pairs together, with their sends after both, for a runtime that runs them at
            once (torch's takes a function for it). Otherwise their parts run one after the other, each with its sends.
        merge: False leaves every I and W as it is.
        sends_block: a send holds up its rank until its receive is posted, see `af.Transfers`. Receives
            are then posted earlier than `receive_ahead` asks wherever a rank would otherwise wait forever.

    Raises:
        ScheduleError: for invalid arguments, and edges that do not fit the schedule.
    """
    for name, distance in (("receive_ahead", receive_ahead), ("unshard_ahead", unshard_ahead)):
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
    before, after = transfer_actions(schedule, flow, receive_ahead)
    rows = []
    for rank, row in enumerate(schedule):
        gather, release = sharding_actions(row, unshard, unshard_ahead, reduce_grads)
        rows.append(Row(as_table(insert(row, (gather, before[rank]), (after[rank], release)))))
    lowered = Schedule(schedule.name, schedule.placement, schedule.num_microbatches, tuple(rows))
    return receive_before_blocking_sends(lowered, flow) if sends_block else lowered


def merge_backward(schedule: Schedule, flow: Dataflow) -> Schedule:
    """Merge each adjacent I and W into a B, unless an input gradient leaves the rank in between."""
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

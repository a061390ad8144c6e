"""The laws of schedules, checked: each action once, on its rank, in an order that can run, with matched communication."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from autofunc.errors import ScheduleError
from autofunc.schedule.effects import Edge
from autofunc.schedule.ir import OVERLAPPED, Action, Kind, Schedule, is_transfer
from autofunc.schedule.laws.error_grid import error_at, grid
from autofunc.schedule.laws.network import Crossing, Indices, Network, build_network, computations
from autofunc.schedule.laws.order import check_order
from autofunc.schedule.laws.residency import check_residency
from autofunc.schedule.limits import check_sizes
from autofunc.shown import quoted


def validate(schedule: Schedule, edges: Sequence[Edge] | None = None, sends_block: bool = False) -> None:
    """Check a schedule, in compute form or lowered.

    Every (stage, microbatch) runs F once and either B once or I and W once, on the rank its stage is placed on and in
    dependency order; a forward-only schedule runs each F once. In lowered form every send has its receive, and each rank
    receives from every other in the order in which that one sends, so that one channel per directed pair of ranks will
    do; nothing deadlocks even if nothing is buffered, every transfer waits for those before it on its channel, and a
    rank that waits does nothing else; nothing is live at the end. A runtime that connects its channels beforehand may
    rely on just that. If the schedule gathers sharded parameters, they are there whenever a computation uses them, and
    freed at the end.

    Args:
        schedule: what to check.
        edges: connections between stages; a chain by default.
        sends_block: also require that it ends if a rank that sends does nothing else until the receive is posted.
            For lowered schedules, see `lower`.

    Raises:
        ScheduleError: naming rank, position and action, with the grid and the action marked.
    """
    if not all(0 <= rank < schedule.num_ranks for rank in schedule.placement):
        raise ScheduleError(f"placement {quoted(schedule.placement)}: there are ranks 0 to {schedule.num_ranks - 1}")
    check_sizes(schedule.num_ranks, schedule.num_stages, schedule.num_microbatches, sum(map(len, schedule)))
    for rank, row in enumerate(schedule):
        _check_ranges(schedule, rank, row.table)
        _check_overlapped(schedule, rank, row.table)
    found = computations(schedule)
    _check_complete(schedule, found)
    network = build_network(schedule, edges, found)
    if schedule.is_lowered:
        _check_transfers(network)
    check_residency(schedule)
    check_order(network, sends_block)


def _check_ranges(schedule: Schedule, rank: int, table: npt.NDArray[np.int32]) -> None:
    """Check that stages and microbatches exist, and that stages are on the rank they are placed on."""
    stage, kind, microbatch = table[:, 0], table[:, 1], table[:, 2]
    placement = np.array(schedule.placement)
    bad_stage = (stage < 0) | (stage >= schedule.num_stages)
    bad_microbatch = (kind < Kind.UNSHARD) & ((microbatch < 0) | (microbatch >= schedule.num_microbatches))
    elsewhere = placement[np.where(bad_stage, 0, stage)] != rank
    for position in np.flatnonzero(bad_stage | bad_microbatch | elsewhere)[:1]:
        if bad_stage[position]:
            reason = f"there are stages 0 to {schedule.num_stages - 1}"
        elif bad_microbatch[position]:
            reason = f"there are microbatches 0 to {schedule.num_microbatches - 1}"
        else:
            reason = f"stage {stage[position]} is placed on rank {placement[stage[position]]}"
        raise error_at(schedule, rank, int(position), reason)


def _check_overlapped(schedule: Schedule, rank: int, table: npt.NDArray[np.int32]) -> None:
    """Check that an F marked as overlapped has a backward right after it."""
    marked = np.flatnonzero(table[:, 3] == OVERLAPPED)
    following = np.append(table[:, 1], -1)[marked + 1]
    wrong = (table[marked, 1] != Kind.F) | ~np.isin(following, (Kind.B, Kind.I))
    for position in marked[wrong][:1]:
        raise error_at(schedule, rank, int(position), "marked to overlap with the next action, which is not a backward")
    of_itself = (table[marked, 0] == table[marked + 1, 0]) & (table[marked, 2] == table[marked + 1, 2])
    for position in marked[of_itself][:1]:
        raise error_at(schedule, rank, int(position), "marked to overlap with its own backward, which needs its result")


def _check_complete(schedule: Schedule, positions: Indices) -> None:
    """Check that each (stage, microbatch) has F once, and B once or I and W once."""
    there = positions >= 0
    if np.count_nonzero(there) < sum(int(np.count_nonzero(row.table[:, 1] <= Kind.W)) for row in schedule):
        raise _doubled(schedule)
    f, b, i, w = there
    complete = f & ~(b | i | w) if schedule.is_forward_only else f & (b ^ (i & w)) & (b ^ i) & (b ^ w)
    # partly present ones come first: they tell more than entirely missing ones
    partial = np.concatenate((np.argwhere(~complete & (f | b | i | w)), np.argwhere(~complete)))
    for stage, microbatch in partial[:1].tolist():
        rank = schedule.placement[stage]
        found = [Action(stage, kind, microbatch) for kind in list(Kind)[:4] if there[kind, stage, microbatch]]
        places = (schedule[rank].table[:, (0, 2)] == (stage, microbatch)).all(axis=1)
        position = int(np.argmax(places & (schedule[rank].table[:, 1] <= Kind.W)))
        named = f", position {position}, {schedule[rank][position]}" if found else ""
        raise ScheduleError(
            f"rank {rank}{named}: stage {stage}, microbatch {microbatch} has {', '.join(map(str, found)) or 'nothing'}; "
            f"expected F once, and B once or I and W once\n{grid(schedule, (rank, position) if found else None)}"
        )


def _doubled(schedule: Schedule) -> ScheduleError:
    """Make the error for the first computation that runs twice."""
    for rank, row in enumerate(schedule):
        positions = np.flatnonzero(row.table[:, 1] <= Kind.W)
        stage, kind, microbatch, _ = row.table[positions].T.astype(np.int64)
        key = (kind * schedule.num_stages + stage) * schedule.num_microbatches + microbatch
        _, where = np.unique(key, return_index=True)
        for again in np.setdiff1d(np.arange(len(key)), where)[:1].tolist():
            before = int(positions[np.flatnonzero(key == key[again])[0]])
            reason = f"it already ran at position {before}; each runs exactly once"
            return error_at(schedule, rank, int(positions[again]), reason)
    raise AssertionError("no computation runs twice")


def _check_transfers(network: Network) -> None:
    """Check that every value that changes ranks is sent and received once, in one order for each pair of ranks."""
    expected = 0
    between: dict[tuple[int, int], list[Crossing]] = {}
    placement = network.schedule.placement
    for crossing in network.crossings:
        _check_ends(network, crossing)
        expected += 2 * len(crossing.send)
        between.setdefault((placement[crossing.source], placement[crossing.target]), []).append(crossing)
    for (source, target), crossings in between.items():
        send = np.concatenate([crossing.send for crossing in crossings])
        receive = np.concatenate([crossing.receive for crossing in crossings])
        by_send, by_receive = np.argsort(send), np.argsort(receive)
        for k in np.flatnonzero(by_send != by_receive)[:1]:
            sent, received = int(send[by_send[k]]), int(receive[by_receive[k]])
            raise ScheduleError(
                f"rank {target} receives in a different order than rank {source} sends: "
                f"{network.describe(sent)} is sent where {network.describe(received)} is received\n"
                + grid(network.schedule, network.locate(received))
            )
    transfers = np.flatnonzero(is_transfer(network.table))
    if len(transfers) == expected:
        return
    used = [ends for crossing in network.crossings for ends in (crossing.send, crossing.receive)]
    extra = int(np.setdiff1d(transfers, np.concatenate(used) if used else [])[0])
    stage, kind, microbatch, peer = network.table[extra].tolist()
    same = np.flatnonzero((network.table == network.table[extra]).all(axis=1))
    if len(same) > 1:
        reason = f"it was already posted at position {network.locate(int(same[0]))[1]}; each is posted exactly once"
        extra = int(same[1])
    else:
        reason = f"no value of microbatch {microbatch} goes between stages {stage} and {peer} this way ({Kind(kind).name})"
    raise error_at(network.schedule, *network.locate(extra), reason)


def _check_ends(network: Network, crossing: Crossing) -> None:
    """Check that the send and the receive of every microbatch exist."""
    for ends, other, what, missing in (
        (crossing.send, crossing.receive, "receive", "send"),
        (crossing.receive, crossing.send, "send", "receive"),
    ):
        for microbatch in np.flatnonzero(ends < 0)[:1].tolist():
            token = crossing.bundle.of(microbatch)
            if other[microbatch] >= 0:
                raise error_at(
                    network.schedule, *network.locate(int(other[microbatch])), f"its {missing} is missing ({token})"
                )
            reader = int(crossing.bundle.reader[microbatch])
            raise error_at(network.schedule, *network.locate(reader), f"needs the {token}, which has no send and no {what}")

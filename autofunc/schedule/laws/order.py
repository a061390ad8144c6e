"""Can every rank run its row to the end? If not, who waits for whom.

Each rank runs its row in order. An action runs once every value it reads is on its rank: in compute form once it is made,
in lowered form once it is sent and its RECV is posted. Posting never blocks, so this is execution with zero buffering. With
`sends_block`, a SEND holds up its rank until its RECV is posted. All ranks take one step at a time, together: a step costs
five numpy calls, whatever the number of ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from autofunc.errors import ScheduleError
from autofunc.schedule.effects import Token
from autofunc.schedule.ir import Kind
from autofunc.schedule.laws.error_grid import grid
from autofunc.schedule.laws.network import Bundle, Network, by_action
from autofunc.shown import shown

_MOST_REASONS = 4
"""How many ranks of a cycle an error names."""


class _Wait(NamedTuple):
    """An action that cannot run, and why."""

    flat: int  # the action
    token: Token  # the value it needs; for a blocking send, the value it sends
    giver: int  # the action that should make, send or receive that value; -1 for none


def check_order(network: Network, sends_block: bool = False) -> None:
    """Run all ranks to the ends of their rows.

    Args:
        network: who waits for whom.
        sends_block: a SEND waits until its RECV is posted; ignored in compute form.

    Raises:
        ScheduleError: if a value is read before it is made on the same rank, or no rank can go on. The message holds
            the grid with the action marked.
    """
    check_local_order(network)
    sends_block = sends_block and network.schedule.is_lowered
    pairs = [(crossing.bundle.reader, crossing.send) for crossing in network.crossings]
    pairs += [(crossing.send, crossing.receive) for crossing in network.crossings if sends_block]
    count = network.num_actions
    waits_for = by_action(pairs, count, padding=count)
    # by action; index `count`, for what waits for nothing, is True; index -1, for a missing action, stays False
    ran = np.zeros(count + 2, bool)
    ran[count] = True
    position, stop = network.first[:-1].copy(), network.first[1:]
    while (left := position < stop).any():
        position, stop = position[left], stop[left]
        for _ in range(int((stop - position).min())):  # no rank ends within this many steps
            goes = ran.take(waits_for[0].take(position))
            for others in waits_for[1:]:
                goes &= ran.take(others.take(position))
            if not goes.any():
                raise _stuck(network, position, ran, sends_block)
            ran[position] = goes
            position += goes


def check_local_order(network: Network) -> None:
    """Check that each rank makes its values before it reads or sends them, and receives others before it reads them.

    Raises:
        ScheduleError: for the first read or send that comes too early.
    """
    pairs = [(bundle.maker, bundle.reader, bundle) for bundle in network.local]
    if network.schedule.is_lowered:
        pairs += [(crossing.bundle.maker, crossing.send, crossing.bundle) for crossing in network.crossings]
        pairs += [(crossing.receive, crossing.bundle.reader, crossing.bundle) for crossing in network.crossings]
    first: tuple[int, int, int, Bundle] | None = None
    for maker, reader, bundle in pairs:
        wrong = np.flatnonzero((reader >= 0) & ((maker < 0) | (maker > reader)))
        for microbatch in wrong[np.argsort(reader[wrong])][:1].tolist():
            if first is None or reader[microbatch] < first[0]:
                first = int(reader[microbatch]), int(maker[microbatch]), microbatch, bundle
    if first is not None:
        flat, giver, microbatch, bundle = first
        raise _cannot_go_on(network, [_Wait(flat, bundle.of(microbatch), giver)])


def _stuck(
    network: Network, positions: npt.NDArray[np.int64], ran: npt.NDArray[np.bool_], sends_block: bool
) -> ScheduleError:
    """Make the error that names the ranks that wait for each other in a cycle.

    Args:
        network: who waits for whom.
        positions: the action at which each unfinished rank waits.
        ran: bool, by action.
        sends_block: as for `check_order`.
    """
    at = {network.locate(flat)[0]: flat for flat in positions.tolist()}
    seen: dict[int, _Wait] = {}  # by rank; each waits for the next
    rank = next(iter(at))
    while rank in at and rank not in seen:
        seen[rank], rank = _missing(network, at[rank], ran, sends_block)
    waiting = list(seen.values())[list(seen).index(rank) if rank in seen else 0 :]
    if rank in seen:  # report a cycle from a blocking send on, if it has one
        begin = next((number for number, each in enumerate(waiting) if _blocks(network, each)), 0)
        waiting = waiting[begin:] + waiting[:begin]
    return _cannot_go_on(network, waiting, len(positions))


def _missing(network: Network, flat: int, ran: npt.NDArray[np.bool_], sends_block: bool) -> tuple[_Wait, int]:
    """Find the value an action waits for, and the rank that should send or receive it."""
    placement, microbatch = network.schedule.placement, int(network.table[flat, 2])
    for crossing in network.crossings:
        if crossing.bundle.reader[microbatch] == flat and not ran[crossing.send[microbatch]]:
            giver = int(crossing.send[microbatch])
            return _Wait(flat, crossing.bundle.of(microbatch), giver), placement[crossing.source]
    for crossing in network.crossings if sends_block else ():
        if crossing.send[microbatch] == flat and not ran[crossing.receive[microbatch]]:
            giver = int(crossing.receive[microbatch])
            return _Wait(flat, crossing.bundle.of(microbatch), giver), placement[crossing.target]
    raise AssertionError(f"{network.describe(flat)} waits for nothing")


def _cannot_go_on(network: Network, waiting: list[_Wait], num_ranks: int = 1) -> ScheduleError:
    """Make the error for actions that never start, each with the value it needs and the action that should supply it.

    They wait for each other in a cycle, or the last for what no action supplies. `num_ranks` ranks wait in all.
    """
    reasons = []
    for wait in waiting[:_MOST_REASONS]:
        by_whom = "which no action makes" if wait.giver < 0 else f"which {_giver(network, wait.giver)}"
        needs = "blocks until somebody receives the" if _blocks(network, wait) else "needs the"
        reasons.append(f"{network.describe(wait.flat)}: {needs} {wait.token}, {by_whom}")
    if num_ranks > len(reasons):
        reasons.append(f"and {num_ranks - len(reasons):,} more ranks wait")
    return ScheduleError(
        f"schedule {shown(network.schedule.name)} cannot go on: {'; '.join(reasons)}\n"
        + grid(network.schedule, network.locate(waiting[0].flat))
    )


def _blocks(network: Network, wait: _Wait) -> bool:
    """Return whether an action is a send that waits for its receive."""
    giver = wait.giver
    return giver >= 0 and Kind(network.table[wait.flat, 1]).is_send and Kind(network.table[giver, 1]).is_receive


def _giver(network: Network, flat: int) -> str:
    rank, position = network.locate(flat)
    action = network.schedule[rank][position]
    verb = "sends" if action.kind.is_send else "receives" if action.kind.is_receive else "makes"
    return f"{action} {verb} at position {position} of rank {rank}"

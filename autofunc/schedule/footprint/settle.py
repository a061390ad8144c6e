"""When a send is known to be complete, so that the memory it was sent from can be freed.

If a rank sends a message after it has read a value, the message proves that the value had arrived. So a rank that waits
for such a message learns, without asking, that an earlier send of its own is complete.
"""

from __future__ import annotations

from collections.abc import Sequence

from autofunc.schedule.effects import Edge, Token, carried_by, flow_of
from autofunc.schedule.ir import Schedule

Settled = dict[int, list[int]]
"""Position of an action -> positions of earlier SENDs of the row, complete once the action's inputs have arrived."""


def settled_sends(schedule: Schedule, edges: Sequence[Edge] | None = None) -> tuple[Settled, ...]:
    """Return, per rank, the sends that each action proves complete. Sends that no action proves end with the step.

    Args:
        schedule: lowered.
        edges: connections between stages; a chain by default.
    """
    flow = flow_of(schedule, edges)
    sent: dict[Token, tuple[int, int]] = {}  # (rank, position) of the SEND
    read_at: dict[Token, int] = {}  # position of the reader in its rank's row
    for rank, row in enumerate(schedule):
        for position, action in enumerate(row):
            if action.kind.is_send:
                sent[carried_by(action)] = (rank, position)
            else:
                read_at.update(dict.fromkeys(flow.effect(action).reads, position))
    settled: list[Settled] = []
    for row in schedule:
        found: Settled = {}
        receiving: set[Token] = set()
        open_sends: dict[int, list[tuple[int, Token]]] = {}  # by rank that receives
        for position, action in enumerate(row):
            if action.kind.is_receive:
                receiving.add(carried_by(action))
                continue
            if action.kind.is_send:
                open_sends.setdefault(schedule.placement[action.peer], []).append((position, carried_by(action)))
                continue
            for token in flow.effect(action).reads:
                if token in receiving:
                    receiving.discard(token)
                    sender, sent_at = sent[token]
                    waiting = open_sends.get(sender, [])
                    proven = [send for send in waiting if read_at[send[1]] < sent_at]
                    found.setdefault(position, []).extend(number for number, _ in proven)
                    open_sends[sender] = [send for send in waiting if send not in proven]
        settled.append({position: sends for position, sends in found.items() if sends})
    return tuple(settled)

"""Lowering: from computations to the full program with sends and receives.

A send is posted right after the action that makes its value. A receive is posted `prefetch` computations before the
action that reads it, so that the transfer overlaps what runs in between. On each directed edge the receives are posted
in the order of the sends, because a channel keeps its order.
"""

from __future__ import annotations

from collections.abc import Sequence

from autofunc.schedule.effects import Activation, Cotangent, Dataflow, Edge, chain
from autofunc.schedule.ir import Action, Kind, Row, Schedule, as_table

Channel = tuple[int, int]
"""(sending stage, receiving stage): values on one channel arrive in the order in which they were sent."""


def lower(schedule: Schedule, edges: Sequence[Edge] | None = None, prefetch: int = 1) -> Schedule:
    """Add SEND and RECV actions for every edge between stages on different ranks.

    Args:
        schedule: in compute form; a lowered one is lowered anew.
        edges: connections between stages; a chain by default.
        prefetch: how many computations before its reader a receive is posted; 0 posts it right before.
    """
    schedule = schedule.compute_form()
    flow = Dataflow(chain(schedule.num_stages) if edges is None else edges, schedule.is_forward_only)
    placement = schedule.placement
    sends: dict[Channel, list[int]] = {}  # microbatches in the order in which each channel carries them
    readers: dict[tuple[Channel, int], int] = {}  # (channel, microbatch) -> position of the reader in its rank's row
    after: list[list[list[Action]]] = [[[] for _ in row] for row in schedule]
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

    before: list[list[list[Action]]] = [[[] for _ in row] for row in schedule]
    for (sender, receiver), microbatches in sends.items():
        rank = placement[receiver]
        kind = Kind.RECV_F if sender < receiver else Kind.RECV_B
        latest = len(before[rank]) - 1
        for microbatch in reversed(microbatches):
            latest = min(latest, readers.get(((sender, receiver), microbatch), latest))
            before[rank][max(latest - prefetch, 0)].append(Action(receiver, kind, microbatch, sender))
    rows = []
    for rank, row in enumerate(schedule):
        actions: list[Action] = []
        for position, action in enumerate(row):
            # collected from the last send to the first: reversed, each channel is in the order of its sends
            actions += reversed(before[rank][position])
            actions.append(action)
            actions += after[rank][position]
        rows.append(Row(as_table(actions)))
    return Schedule(schedule.name, placement, schedule.num_microbatches, tuple(rows), schedule.in_order)

"""Where in the rows values are sent and received.

A send is posted right after the action that makes its value. A receive is posted `receive_ahead` computations before the
action that reads it, so that the transfer overlaps what runs in between. From each rank to each other the receives are
posted in the order of the sends, whatever their stages: a channel between two ranks keeps its order, and some have no
other way to tell messages apart. A receive that would come out of order is posted earlier; it only posts, so nothing waits
behind it.
"""

from __future__ import annotations

from autofunc.schedule.effects import Activation, Dataflow, EdgeToken
from autofunc.schedule.ir import Action, Kind, Schedule
from autofunc.schedule.lowering.gaps import Gaps

RankPair = tuple[int, int]
"""(rank that sends, rank that receives)."""


def transfer_actions(schedule: Schedule, flow: Dataflow, receive_ahead: int) -> tuple[list[Gaps], list[Gaps]]:
    """Return, per rank, the receives to post before each computation and the sends to post after it.

    Args:
        schedule: in compute form.
        flow: its effects along the edges between stages.
        receive_ahead: how many computations before its reader a receive is posted.
    """
    placement = schedule.placement
    sent: dict[RankPair, list[EdgeToken]] = {}  # in the order in which each rank sends them
    readers: dict[EdgeToken, int] = {}  # position of the reader in its rank's row
    after: list[Gaps] = [[[] for _ in row] for row in schedule]
    for rank, row in enumerate(schedule):
        for position, action in enumerate(row):
            effect = flow.effect(action)
            for token in effect.writes:
                if isinstance(token, EdgeToken) and placement[token.target] != rank:
                    kind = Kind.SEND_F if isinstance(token, Activation) else Kind.SEND_B
                    after[rank][position].append(Action(token.source, kind, token.microbatch, token.target))
                    sent.setdefault((rank, placement[token.target]), []).append(token)
            for token in effect.reads:
                if isinstance(token, EdgeToken) and placement[token.source] != rank:
                    readers[token] = position

    before: list[Gaps] = [[[] for _ in row] for row in schedule]
    for (_, rank), tokens in sent.items():
        latest = len(before[rank]) - 1
        for token in reversed(tokens):
            latest = min(latest, readers.get(token, latest))
            kind = Kind.RECV_F if isinstance(token, Activation) else Kind.RECV_B
            before[rank][max(latest - receive_ahead, 0)].append(Action(token.target, kind, token.microbatch, token.source))
    for gaps in before:
        for gap in gaps:
            gap.reverse()  # collected from the last send to the first
    return before, after

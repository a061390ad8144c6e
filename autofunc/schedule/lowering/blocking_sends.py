"""Receives moved ahead to where blocking sends need them.

On some transports a send returns only once its receive is posted, as in MPI's rendezvous protocol (MPI 4.1, section 3.4:
the synchronous mode). Two ranks that send to each other then wait forever, unless one of them has posted its receive
before. Here all ranks run under that rule until none can go on, which always forms a cycle; the receive that one of the
cycle waits for is then posted right before the action its rank is stuck in, and so on. A receive only posts, so posting it
earlier holds up nobody; but it holds a slot for longer, so each cycle moves the one that passes the fewest computations.
"""

from __future__ import annotations

from autofunc.schedule.effects import Dataflow, EdgeToken, carried_by
from autofunc.schedule.ir import OVERLAPPED, Action, Row, Schedule, as_table


def receive_before_blocking_sends(lowered: Schedule, flow: Dataflow) -> Schedule:
    """Move as many receives ahead as it takes for the schedule to end if sends block.

    A schedule that cannot end even so is returned as it is, for `validate` to report why.

    Args:
        lowered: with sends and receives, in the same order on both ranks of each pair.
        flow: its effects along the edges between stages.
    """
    ranks = _Ranks(lowered, flow)
    while True:
        ranks.run()
        circle = ranks.circle()
        sends = [token for token in circle if ranks.is_sent(token)]
        if not sends:
            break
        ranks.receive_now(min(sends, key=ranks.distance))
    if not ranks.moved:
        return lowered
    return Schedule(lowered.name, lowered.placement, lowered.num_microbatches, ranks.rows())


class _Ranks:
    """All ranks, each at its position in its row."""

    def __init__(self, lowered: Schedule, flow: Dataflow) -> None:
        self._placement = lowered.placement
        self._actions = [list(row) for row in lowered]
        self._at = [0] * len(lowered)  # by rank: the position of its next action
        self._posted: set[EdgeToken] = set()  # values whose receives are posted
        self._sent: set[EdgeToken] = set()
        self._waits: dict[int, EdgeToken] = {}  # by stuck rank: the value whose receive or send it waits for
        self._awake = list(range(len(lowered)))
        self._reads = [[_read(flow, action) for action in row] for row in self._actions]
        self._receive_at = {
            carried_by(action): position
            for row in self._actions
            for position, action in enumerate(row)
            if action.kind.is_receive
        }
        self.moved: dict[tuple[int, int], list[Action]] = {}  # by rank and position: receives to post right before

    def run(self) -> None:
        """Run until no rank can go on."""
        while self._awake:
            rank = self._awake.pop()
            row, reads = self._actions[rank], self._reads[rank]
            while self._at[rank] < len(row):
                position = self._at[rank]
                action = row[position]
                if action.kind.is_send:
                    token = carried_by(action)
                    if token not in self._sent:
                        self._sent.add(token)
                        self._wake(self._placement[token.target], token)
                    missing = token if token not in self._posted else None
                elif action.kind.is_receive:
                    missing = None
                    self._post(carried_by(action))
                else:
                    arriving = (t for t in reads[position] if self._placement[t.source] != rank)
                    missing = next((token for token in arriving if token not in self._sent), None)
                if missing is not None:
                    self._waits[rank] = missing
                    break
                self._at[rank] += 1

    def _post(self, token: EdgeToken) -> None:
        if token not in self._posted:
            self._posted.add(token)
            self._wake(self._placement[token.source], token)

    def _wake(self, rank: int, token: EdgeToken) -> None:
        if self._waits.get(rank) == token:
            del self._waits[rank]
            self._awake.append(rank)

    def is_sent(self, token: EdgeToken) -> bool:
        """Return whether the sender of a value waits for its receive, rather than the receiver for its send."""
        return token in self._sent

    def circle(self) -> list[EdgeToken]:
        """Return the values that a cycle of ranks waits for; none if all have ended, or wait for one that has."""
        seen: dict[int, EdgeToken] = {}
        rank = next(iter(self._waits), -1)
        while rank in self._waits and rank not in seen:
            token = seen[rank] = self._waits[rank]
            rank = self._placement[token.target if self.is_sent(token) else token.source]
        return list(seen.values())[list(seen).index(rank) :] if rank in seen else []

    def distance(self, token: EdgeToken) -> int:
        """Count the computations between the receiver's next action and where it would post the receive."""
        rank = self._placement[token.target]
        between = self._actions[rank][self._at[rank] : self._receive_at[token]]
        return sum(action.kind.is_compute for action in between)

    def receive_now(self, token: EdgeToken) -> None:
        """Post the receive of a value right before the action its rank is stuck in."""
        rank = self._placement[token.target]
        row, position = self._actions[rank], self._at[rank]
        if row[position - 1].peer == OVERLAPPED and position:  # an overlapped pair stays together
            position -= 1
        self.moved.setdefault((rank, position), []).append(row[self._receive_at[token]])
        self._post(token)

    def rows(self) -> tuple[Row, ...]:
        """Return the rows, with each receive where it was first posted."""
        early = {action for receives in self.moved.values() for action in receives}
        rows = []
        for rank, row in enumerate(self._actions):
            actions: list[Action] = []
            for position, action in enumerate(row):
                actions += self.moved.get((rank, position), ())
                if action not in early:
                    actions.append(action)
            rows.append(Row(as_table(actions)))
        return tuple(rows)


def _read(flow: Dataflow, action: Action) -> tuple[EdgeToken, ...]:
    """Return what a computation reads from other stages."""
    if not action.kind.is_compute:
        return ()
    return tuple(token for token in flow.effect(action).reads if isinstance(token, EdgeToken))

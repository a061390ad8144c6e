"""Random mutations of valid schedules: the validator must always agree with a plain reading of the laws."""

from __future__ import annotations

import random
from collections import Counter, deque

import pytest

from autofunc import schedule
from autofunc.errors import ScheduleError
from autofunc.schedule import Action, Kind, Row, Schedule
from autofunc.schedule.ir import OVERLAPPED, as_table

MUTATIONS = 2000


def keeps_the_laws(s: Schedule) -> bool:
    """Check the laws literally, one action at a time; slow, and independent of the validator's arrays."""
    flow = schedule.Dataflow(schedule.chain(s.num_stages), s.is_forward_only)
    ran = Counter((a.stage, a.kind, a.microbatch) for row in s for a in row if a.kind.is_compute)
    if any(count > 1 for count in ran.values()):
        return False
    for stage in range(s.num_stages):
        for microbatch in range(s.num_microbatches):
            kinds = {kind for kind in Kind if ran[stage, kind, microbatch]}
            if kinds not in ({Kind.F, Kind.B}, {Kind.F, Kind.I, Kind.W}):
                return False
    lowered = any(action.kind.is_send or action.kind.is_receive for row in s for action in row)
    for row in s:
        for action, following in zip(row, [*row[1:], None], strict=True):
            if action.peer == OVERLAPPED and (following is None or following.kind not in (Kind.B, Kind.I)):
                return False
            if action.peer == OVERLAPPED and (action.stage, action.microbatch) == (following.stage, following.microbatch):
                return False
    live: set[object] = set()
    sends: dict[object, deque[Action]] = {}
    receives: dict[object, deque[Action]] = {}
    position = [0] * s.num_ranks
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(s):
            while position[rank] < len(row):
                action = row[position[rank]]
                effect = flow.effect(action)
                if any((rank, token) not in live for token in effect.reads):
                    break
                live -= {(rank, token) for token in effect.reads}
                position[rank], moved = position[rank] + 1, True
                if action.kind.is_compute:
                    for token in effect.writes:
                        travels = type(token).__name__ in ("Activation", "Cotangent") and not lowered
                        live.add((s.placement[token.target] if travels else rank, token))
                    continue
                is_send = action.kind.is_send
                pair = (rank, s.placement[action.peer]) if is_send else (s.placement[action.peer], rank)
                (sends if is_send else receives).setdefault(pair, deque()).append(action)
                if sends.get(pair) and receives.get(pair):
                    sent, received = sends[pair].popleft(), receives[pair].popleft()
                    if (sent.stage, sent.microbatch, sent.peer) != (received.peer, received.microbatch, received.stage):
                        return False
                    live.add((s.placement[received.stage], flow.effect(received).writes[0]))
    done = all(position[rank] == len(row) for rank, row in enumerate(s))
    return done and not live and not any(sends.values()) and not any(receives.values())


def mutate(s: Schedule, rng: random.Random) -> tuple[Schedule, str]:
    rows = [list(row) for row in s]
    rank = rng.randrange(len(rows))
    row = rows[rank]
    what = rng.choice(["swap", "drop", "duplicate", "move"])
    here, there = rng.randrange(len(row)), rng.randrange(len(row))
    if what == "swap":
        row[here], row[there] = row[there], row[here]
    elif what == "drop":
        del row[here]
    elif what == "duplicate":
        row.insert(there, row[here])
    else:
        row.insert(there, row.pop(here))
    broken = tuple(Row(as_table(row)) for row in rows)
    return Schedule(s.name, s.placement, s.num_microbatches, broken), what


def test_the_plain_validator_accepts_valid_schedules() -> None:
    for name in schedule.names():
        s = schedule.build(name, num_ranks=3, num_microbatches=6)
        assert keeps_the_laws(s) and keeps_the_laws(schedule.lower(s))


def test_every_mutation_is_judged_correctly() -> None:
    rng = random.Random(0)
    verdicts: Counter[tuple[str, bool]] = Counter()
    for _ in range(MUTATIONS):
        p, name = rng.randrange(1, 4), rng.choice(schedule.names())
        s = schedule.build(name, num_ranks=p, num_microbatches=rng.randrange(2 * p, 2 * p + 3))
        if rng.random() < 0.5:
            s = schedule.lower(s, receive_ahead=rng.randrange(3), keep_overlapped=rng.random() < 0.5)
        broken, what = mutate(s, rng)
        if keeps_the_laws(broken):
            schedule.validate(broken)
            verdicts[what, True] += 1
        else:
            with pytest.raises(ScheduleError, match=r"rank \d+"):
                schedule.validate(broken)
            verdicts[what, False] += 1
    assert verdicts["drop", True] == verdicts["duplicate", True] == 0
    assert min(verdicts[what, False] for what in ("swap", "drop", "duplicate", "move")) > MUTATIONS // 8
    assert verdicts["swap", True] + verdicts["move", True] > 0, "some are schedules in their own right"

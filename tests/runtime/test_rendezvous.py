"""No step deadlocks under the rules the runtime relies on; stricter rules would deadlock some."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from autofunc import schedule
from autofunc.errors import ScheduleError
from autofunc.runtime.finish import exchange_ties
from autofunc.runtime.program import Channel
from autofunc.runtime.ties import Tie
from autofunc.schedule import Row, Schedule
from autofunc.schedule.ir import as_table
from autofunc.schedule.named.registry import GENERATORS
from tests.runtime.rendezvous import Post, Rules, Step, Wait, steps_of, stuck
from tests.runtime.test_tokens import world_of
from tests.runtime.threads import BlockingTransport, Deadlock, Hall, run_on_threads
from tests.runtime.token_run import run

SIZES = [(p, m) for p in range(2, 9) for m in range(1, 4 * p + 1)]
SOME = [(2, 1), (2, 3), (2, 4), (3, 2), (3, 6), (4, 1), (4, 8), (5, 12), (8, 16)]
RELIED_ON = Rules()
OTHERS = {
    "not connected before": Rules(connected=False),
    "one communicator for both ways": Rules(both_ways=True),
    "a send waits": Rules(send_waits=True),
    "the host waits": Rules(host_waits=True),
}


def schedules(name: str, sizes: list[tuple[int, int]]) -> Iterator[Schedule]:
    """Yield a named schedule in all sizes it supports."""
    generator = GENERATORS[name]
    for p, m in sizes:
        if generator.fits(p, m, generator.default_stages_per_rank):
            yield schedule.build(name, num_ranks=p, num_microbatches=m)


class Recorder:
    """A transport that records posts instead of making them."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._count = 0

    def open(self, channel: Channel) -> RecordingPort:
        """See `Transport.open`."""
        return RecordingPort(self, channel)

    def broadcast(self, root: int, tensors: list[Tensor]) -> Any:
        """See `Transport.broadcast`."""
        raise AssertionError("ties are not broadcast")


class RecordingPort:
    """Numbers the messages of a channel, at both ends."""

    def __init__(self, recorder: Recorder, channel: Channel) -> None:
        self._recorder, self._channel = recorder, channel

    def send(self, tensors: list[Tensor]) -> RecordedTicket:
        """See `Port.send`."""
        return self._post(tensors, is_send=True)

    def receive(self, into: list[Tensor]) -> RecordedTicket:
        """See `Port.receive`."""
        return self._post(into, is_send=False)

    def _post(self, tensors: list[Tensor], is_send: bool) -> RecordedTicket:
        before = [step for step in self._recorder.steps if isinstance(step, Post)]
        number = sum((step.source, step.target) == self._channel for step in before)
        message = ("tie", self._channel, number)
        self._recorder.steps.append(Post(message, *self._channel, is_send))
        return RecordedTicket(self._recorder, message, tensors)


class RecordedTicket:
    """Complete at once; remembers who waited for it."""

    def __init__(self, recorder: Recorder, message: object, tensors: list[Tensor]) -> None:
        self._recorder, self._message, self.tensors = recorder, message, tensors

    def arrived(self) -> bool:
        """See `Ticket.arrived`."""
        self._recorder.steps.append(Wait((self._message,)))
        return True

    def settle(self) -> None:
        """See `Ticket.settle`."""
        self.arrived()


def with_ties(rows: list[list[Step]], *ranks_of: tuple[int, ...]) -> list[list[Step]]:
    """Append to rows the exchange of parameters that some ranks share, as the runtime does at the end of a step."""
    ties = [
        Tie(f"tie {number}", tuple((f"{number}.{rank}", rank) for rank in ranks), ((1,), torch.float32))
        for number, ranks in enumerate(ranks_of)
    ]
    found = []
    for rank, row in enumerate(rows):
        recorder = Recorder()
        sums = {path: torch.zeros(1) for tie in ties for path, owner in tie.holders if owner == rank}
        for _ in exchange_ties(rank, sums, ties, recorder, torch.device("cpu")):
            raise AssertionError("nothing is waited for here")
        found.append([*row, *recorder.steps])
    return found


@pytest.mark.parametrize("name", schedule.names())
@pytest.mark.parametrize(
    "sizes", [SOME, pytest.param(SIZES[::4], marks=pytest.mark.full)], ids=["some sizes", "every fourth size"]
)
def test_no_named_schedule_deadlocks(name: str, sizes: list[tuple[int, int]]) -> None:
    """Nor does any in the other three quarters of SIZES, tried once: they take minutes."""
    for number, built in enumerate(schedules(name, sizes)):
        last, ahead = built.num_ranks - 1, number % 3
        for form in (built, built.forward_form(), built.split_form()):
            rows = steps_of(schedule.lower(form, receive_ahead=ahead))
            ties = ((0, last), tuple({0, last // 2, last}), (last, 0))
            assert stuck(with_ties(rows, *ties), RELIED_ON) == [], (built, ahead)


def test_no_searched_schedule_deadlocks() -> None:
    costs = schedule.Costs(F=(1.0, 2.0, 1.5, 1.0), I=(1.0, 2.0, 1.0, 1.5), W=(0.5, 1.0, 1.0, 1.0), comm=0.1)
    found = schedule.search(costs, num_ranks=4, num_microbatches=8, time_limit_s=0.2)
    assert stuck(steps_of(schedule.lower(found)), RELIED_ON) == []


@pytest.mark.parametrize("rules", OTHERS.values(), ids=OTHERS)
def test_rendezvous_is_not_relied_on(rules: Rules) -> None:
    """Why ranks are connected before the first step, separately per direction, and nothing waits at a post."""
    bites = 0
    for name in ("v_half", "zbv", "gpipe"):
        for built in schedules(name, [(4, 1), (4, 8)]):
            try:
                bites += bool(stuck(with_ties(steps_of(schedule.lower(built)), (0, 3)), rules))
            except AssertionError as error:
                assert "meet" in str(error)
                bites += 1
    assert bites


@pytest.mark.parametrize("name", ["1f1b", "interleaved_1f1b", "zb_h1", "zbv", "v_half", "dualpipe_v"])
def test_real_programs_agree(name: str) -> None:
    """On threads, with ports that block."""
    for built in schedules(name, [(2, 1), (2, 4), (4, 1), (4, 8)]):
        world = world_of(built, 1)
        rows = steps_of(world.schedule)
        for rules in (RELIED_ON, *(rules for rules in OTHERS.values() if not rules.both_ways)):
            hall = Hall(built.num_ranks)
            found = False
            try:
                run(
                    world, world.programs(),
                    transport=lambda hub, rank, hall=hall, rules=rules: BlockingTransport(hub, rank, hall, rules),  # type: ignore[misc]
                    together=lambda ranks, _, hall=hall: run_on_threads(ranks, hall),  # type: ignore[misc]
                )  # fmt: skip
            except Deadlock:
                found = True
            assert found == bool(stuck(rows, rules)), (built, rules)
            assert not found or rules != RELIED_ON


@pytest.mark.parametrize("count", [50, pytest.param(500, marks=pytest.mark.full)])
def test_different_orders_are_refused(count: int) -> None:
    """Two swapped receives of a rank from another: the second would take the first's message."""
    draw, refused = random.Random(0), 0
    known = [
        schedule.lower(built, receive_ahead=built.num_microbatches % 3)
        for name in schedule.names()
        for built in schedules(name, [(2, 3), (2, 4), (3, 7), (4, 8)])
    ]
    while refused < count:
        lowered = draw.choice(known)
        rank = draw.randrange(lowered.num_ranks)
        row = list(lowered[rank])
        of_one: dict[int, list[int]] = {}
        for position, action in enumerate(row):
            if action.kind.is_receive:
                of_one.setdefault(lowered.placement[action.peer], []).append(position)
        positions = draw.choice([each for each in of_one.values() if len(each) > 1] or [[]])
        if not positions:
            continue
        one, other = draw.sample(positions, 2)
        row[one], row[other] = row[other], row[one]
        rows = [*lowered.rows]
        rows[rank] = Row(as_table(row))
        with pytest.raises(ScheduleError, match=r"receives in a different order|needs the|cannot go on"):
            schedule.validate(replace(lowered, rows=tuple(rows)))
        refused += 1

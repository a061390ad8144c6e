"""Rows of V-shaped schedules against step-by-step versions of the published constructions."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from autofunc import schedule
from autofunc.schedule import Action, Kind
from autofunc.schedule.ir import OVERLAPPED


class StepByStep:
    """One rank: passes are requested one at a time, and each I leaves a W to do."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.stages = rank, 2 * num_ranks - 1 - rank
        self.row: list[Action] = []
        self.counts: Counter[tuple[int, str]] = Counter()
        self.waiting: list[Action] = []

    def run(self, *passes: str) -> None:
        """Each is a kind and a stage, 0 on the way down and 1 on the way up: "F0", "I1", "F0~" overlapped, or "W"."""
        for text in passes:
            if text == "W":
                self.row.append(self.waiting.pop(0))
                continue
            kind, stage = Kind[text[0]], self.stages[int(text[1])]
            if kind is Kind.W:
                first = next(each for each in self.waiting if each.stage == stage)
                self.waiting.remove(first)
                self.row.append(first)
                continue
            counted = stage, "F" if kind is Kind.F else "backward"
            action = Action(stage, kind, self.counts[counted], OVERLAPPED if text.endswith("~") else -1)
            self.counts[counted] += 1
            self.row.append(action)
            if kind is Kind.I:
                self.waiting.append(action._replace(kind=Kind.W))


def zbv(rank: int, p: int, m: int) -> list[Action]:
    """torch 2.13, `ScheduleZBVZeroBubble._calculate_single_rank_operations`."""
    steps, n = StepByStep(rank, p), max(m, 2 * p - 1)
    for _ in range(2 * (p - rank) - 1):
        steps.run("F0")
    for _ in range(rank):
        steps.run("F1", "F0")
    for _ in range(p - rank):
        steps.run("F1", "I1", "W1")
    while steps.counts[steps.stages[1], "F"] < n:
        if steps.counts[steps.stages[0], "F"] < n:
            steps.run("F0")
        steps.run("I0", "W0", "F1", "I1", "W1")
    for _ in range(rank):
        steps.run("I0", "I1")
    for _ in range(p - rank):
        steps.run("I0", "W0")
    while any(each.stage == steps.stages[1] for each in steps.waiting):
        steps.run("W1")
    while steps.waiting:
        steps.run("W0")
    return steps.row


def dualpipe_v(rank: int, p: int, m: int) -> list[Action]:
    """DeepSeek's `dualpipe/dualpipev.py`, steps 1 to 8; the first pair at the turn is not overlapped."""
    steps, below = StepByStep(rank, p), p - 1 - rank
    for _ in range(2 * below):
        steps.run("F0")
    for _ in range(rank + 1):
        steps.run("F0", "F1")
    for _ in range(below):
        steps.run("I1", "W", "F1")
    for step in range(m - 2 * p + rank + 1):
        steps.run("F0~" if step or below else "F0", "B1", "F1~", "B0")
    for _ in range(below):
        steps.run("B1", "F1~", "B0")
    for step in range(2 * (rank + 1)):
        steps.run(f"{'B' if step <= rank else 'I'}{1 - step % 2}")
    for _ in range(below):
        steps.run("W", "I0")
    while steps.waiting:
        steps.run("W")
    return steps.row


def repeated(begins: dict[str, int], rank: int, p: int, m: int) -> list[Action]:
    """A building block unit by unit: a pass where one begins, else the W that has waited longest."""
    steps = StepByStep(rank, p)
    when = {begin + 6 * microbatch: text for text, begin in begins.items() for microbatch in range(m)}
    for time in range(max(when) + 1):
        if time in when:
            steps.run(when[time])
        elif steps.waiting:
            steps.run("W")
    while steps.waiting:
        steps.run("W")
    return steps.row


def v_half(rank: int, p: int, m: int) -> list[Action]:
    """`scheduler/zbv_greedy.py` of the paper's authors, "half"."""
    shift = 3 if p % 2 == 0 else 0
    begins = {"F0": 2 * rank, "F1": 3 * p - 2 - rank, "I1": 3 * p - 1 + shift + 2 * rank, "I0": 6 * p - 2 + shift - rank}
    return repeated(begins, rank, p, m)


def v_min(rank: int, p: int, m: int) -> list[Action]:
    """`scheduler/zbv_greedy.py` of the paper's authors, "min"."""
    shift = 2 if p % 3 == 0 else 0
    begins = {"F0": rank, "F1": 2 * p - 1 - rank, "I1": 2 * p + shift + rank, "I0": 4 * p - 1 + shift - rank}
    return repeated(begins, rank, p, m)


@given(st.sampled_from([zbv, dualpipe_v, v_half, v_min]), st.integers(1, 12), st.integers(1, 60), st.data())
def test_rows_equal_the_step_by_step_construction(construction, p: int, m: int, data: st.DataObject) -> None:
    name = construction.__name__
    m += 2 * p * (name == "dualpipe_v")
    rank = data.draw(st.integers(0, p - 1), "rank")
    row = schedule.build_row(name, rank=rank, num_ranks=p, num_microbatches=m)
    assert list(row) == [action for action in construction(rank, p, m) if action.microbatch < m]


def test_a_large_v_has_no_bubble_inside_a_span() -> None:
    s = schedule.build("zbv", num_ranks=128, num_microbatches=512)
    schedule.validate(s)
    timeline = schedule.simulate(s)
    assert timeline.makespan == 6 * 512 + 127 and timeline.span_bubble_fraction == 0
    assert timeline.peak_activations == (256,) * 128

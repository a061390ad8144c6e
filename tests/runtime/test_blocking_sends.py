"""Schedules lowered for blocking sends end under that rule, and differ from others only where they must."""

from __future__ import annotations

import pytest
import torch

import autofunc as af
from autofunc import schedule
from autofunc.errors import ScheduleError
from autofunc.schedule import Edge, Schedule
from tests.cases import assert_same_tree, make_case, plan_of
from tests.runtime.rendezvous import Rules, steps_of, stuck
from tests.runtime.test_rendezvous import SIZES, SOME, schedules, with_ties
from tests.runtime.test_tokens import world_of
from tests.runtime.threads import BlockingTransport, Hall, run_on_threads
from tests.runtime.token_run import run

BLOCKING = Rules(send_waits=True)


def forms_of(built: Schedule) -> list[Schedule]:
    return [built, built.forward_form(), built.split_form()]


def check(forms: list[Schedule], ahead: int) -> bool:
    """Check the laws of a schedule's forms; return whether any would wait forever if lowered as usual."""
    last, bites = forms[0].num_ranks - 1, False
    for form in forms:
        usual = schedule.lower(form, receive_ahead=ahead)
        lowered = schedule.lower(form, receive_ahead=ahead, sends_block=True)
        deadlocks = bool(stuck(steps_of(usual), BLOCKING))
        assert is_refused(usual) == deadlocks, (form, ahead)
        assert (lowered == usual) == (not deadlocks), (form, ahead)
        assert lowered.compute_form() == usual.compute_form()
        schedule.validate(lowered, sends_block=True)
        schedule.validate(lowered)
        ties = ((0, last), tuple({0, last // 2, last}), (last, 0))
        assert stuck(with_ties(steps_of(lowered), *ties), BLOCKING) == [], (form, ahead)
        bites |= deadlocks
    return bites


def is_refused(lowered: Schedule) -> bool:
    """Return whether `validate` refuses it because it does not end if sends block."""
    try:
        schedule.validate(lowered, sends_block=True)
    except ScheduleError as error:
        assert "blocks until somebody receives" in str(error)
        return True
    return False


@pytest.mark.parametrize("name", schedule.names())
def test_named_schedules_end(name: str) -> None:
    bites = [check(forms_of(built), number % 3) for number, built in enumerate(schedules(name, SOME))]
    assert any(bites) == (name not in ("gpipe",)), "where nothing waits for ever, nothing was tried"


@pytest.mark.full
@pytest.mark.parametrize("name", schedule.names())
def test_named_schedules_of_all_sizes_end(name: str) -> None:
    """Each size in one form with one look-ahead, cycling through them."""
    for number, built in enumerate(schedules(name, SIZES)):
        check([forms_of(built)[number % 3]], number // 3 % 3)


@pytest.mark.parametrize("seed", [0, pytest.param(range(1, 12), marks=pytest.mark.full)])
def test_searched_schedules_end(seed: int | range) -> None:
    costs = schedule.Costs(F=(1.0, 2.0, 1.5, 1.0), I=(1.0, 2.0, 1.0, 1.5), W=(0.5, 1.0, 1.0, 1.0), comm=0.1)
    for number in [seed] if isinstance(seed, int) else seed:
        found = schedule.search(costs, num_ranks=4, num_microbatches=5 + number, seed=number, time_limit_s=0.2)
        check(forms_of(found), number % 3)


@pytest.mark.parametrize("name", ["1f1b", "interleaved_1f1b", "zbv", "v_half", "dualpipe_v"])
def test_real_programs_end(name: str) -> None:
    """On threads, with ports that block: every value is the one it should be."""
    for built in schedules(name, [(2, 1), (2, 4), (4, 1), (4, 8)]):
        world, hall = world_of(built, 1, sends_block=True), Hall(built.num_ranks)
        run(
            world, world.programs(),
            transport=lambda hub, rank, hall=hall: BlockingTransport(hub, rank, hall, BLOCKING),  # type: ignore[misc]
            together=lambda ranks, _, hall=hall: run_on_threads(ranks, hall),  # type: ignore[misc]
        )  # fmt: skip


def test_edges_that_skip_stages_and_overlapped_pairs() -> None:
    edges = [Edge(0, 1), Edge(1, 2), Edge(2, 3), Edge(0, 2), Edge(0, 3, needs_grad=False)]
    for built in schedules("1f1b", [(4, m) for m in range(1, 9)]):
        schedule.validate(schedule.lower(built, edges, sends_block=True), edges, sends_block=True)
    for built in schedules("dualpipe_v", [(2, 4), (3, 7), (4, 8)]):
        lowered = schedule.lower(built, keep_overlapped=True, unshard="each_use", sends_block=True)
        schedule.validate(lowered, sends_block=True)
        assert lowered != schedule.lower(built, keep_overlapped=True, unshard="each_use")


def test_the_cycle_is_named() -> None:
    s = schedule.from_text("0F0 0F1 0B0 0B1 \n 1F0 1B0 1F1 1B1")
    with pytest.raises(ScheduleError) as caught:
        schedule.validate(schedule.lower(s, receive_ahead=0), sends_block=True)
    assert "rank 0, position 3, 0SEND_F1: blocks until somebody receives the activation of microbatch 1" in str(
        caught.value
    )
    assert "which 1RECV_F1 receives at position 4 of rank 1" in str(caught.value)
    assert "rank 1, position 3, 1SEND_B0: blocks until somebody receives the cotangent" in str(caught.value)


def test_a_schedule_that_cannot_end_is_left_to_the_validator() -> None:
    wrong = schedule.from_text("0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1")
    with pytest.raises(ScheduleError, match="cannot go on: rank 0"):
        schedule.validate(schedule.lower(wrong, sends_block=True), sends_block=True)


def test_a_pipeline_gives_the_same_bits() -> None:
    _, stages, loss, batch = make_case("mlp", 4, rows=4)
    built = schedule.build("interleaved_1f1b", num_ranks=2, num_microbatches=4)
    found = []
    for transfers in (None, af.Transfers(sends_block=True)):
        pipe = af.pipeline(stages, built, loss=loss, transfers=transfers)
        params = pipe.init(seed=0)
        found.append(af.value_and_grad(pipe)(params, batch, key=(0, 0)))
        assert is_refused(plan_of(pipe, params, batch, key=(0, 0)).schedule) == (transfers is None)
    assert torch.equal(found[0][0], found[1][0])
    assert_same_tree(found[0][1], found[1][1])

"""The law of programs: run on tokens, each stage gets exactly what it should, and nothing is held or read too long.

Names and integers only, so that it holds over thousands of programs; the laws on tensors then need few sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from autofunc import schedule
from autofunc.errors import PipelineRunError
from autofunc.runtime.program import Program
from autofunc.schedule import Row, Schedule, StageBytes
from autofunc.schedule.ir import as_table
from autofunc.schedule.named.registry import GENERATORS
from autofunc.splitting import Boundaries
from tests.runtime.token_run import TokenStage, World, boundaries_of, run
from tests.runtime.tokens import Lease, Ledger, Residuals, Slot

Size = tuple[int, int]
"""(ranks, microbatches)."""

SIZES = [(p, m) for p in range(1, 9) for m in range(1, 21)]
SMALL = [(p, m) for p, m in SIZES if p * m <= 32]
LARGE = [(4, 16), (5, 12), (6, 18), (7, 15), (8, 20)]
FORMS: dict[str, Callable[[Schedule], tuple[Schedule, bool]]] = {  # (schedule, whether I and W may become B)
    "as built": lambda s: (s, True),
    "split": lambda s: (s.split_form(), False),
    "forward only": lambda s: (s.forward_form(), True),
}


def schedules(name: str, sizes: Sequence[Size]) -> Iterator[Schedule]:
    """Yield a named schedule in all sizes it supports."""
    generator = GENERATORS[name]
    for p, m in sizes:
        if generator.fits(p, m, generator.default_stages_per_rank):
            yield schedule.build(name, num_ranks=p, num_microbatches=m)


# --- what stages hand on and keep -----------------------------------------------------------------------------------

HANDED_ON = ([(1, True)], [(1, True), (2, False)], [(2, True), (1, True)])
"""(elements, whether it needs a gradient) of each value."""


def boundaries(num_stages: int, variant: int) -> Boundaries:
    """One value or two, of one size or two, some without a gradient; in a quarter nothing flows back to stage 0."""
    layouts = [HANDED_ON[(stage + variant) % 3] for stage in range(num_stages - 1)]
    if variant % 4 == 3:
        layouts[:1] = [[(2, False)]] * min(1, len(layouts))
    return boundaries_of(layouts)


def kept(stages: Boundaries, variant: int) -> dict[int, StageBytes]:
    """What each stage holds: nothing it received or made, for I or B, for W too, or one value of several."""
    found = {}
    for stage, boundary in enumerate(stages.stages):
        received = stages.stages[stage - 1].values if stage else ()
        given = tuple(range(len(received)))
        made = tuple(range(len(boundary.values)))
        cotangents = tuple(value.num_bytes for value in boundary.values if value.needs_grad)
        back, forth = tuple(range(sum(value.needs_grad for value in received))), tuple(range(len(cotangents)))
        ways: list[dict[str, tuple[int, ...]]] = [
            {},
            {"kept_inputs": given},
            {"kept_inputs": given, "weight_inputs": given, "weight_cotangents": forth},
            {"kept_inputs": given[-1:], "kept_outputs": made, "weight_cotangents": forth[:1]},
            {"kept_inputs": given, "weight_inputs": given[:1], "weight_input_grads": back, "weight_cotangents": forth[-1:]},
            {"kept_outputs": made, "weight_outputs": made[-1:], "weight_input_grads": back[:1]},
        ]
        outputs = tuple(value.num_bytes for value in boundary.values)
        found[stage] = StageBytes(outputs, cotangents, 100, 10, 1000, **ways[(stage + variant // 2) % len(ways)])
    return found


def world_of(s: Schedule, variant: int, merge: bool = True, **options: Any) -> World:
    """A world for a schedule, lowered with some options."""
    stages = boundaries(s.num_stages, variant)
    return World(schedule.lower(s, stages.edges(), merge=merge, **options), stages, kept(stages, variant))


def run_all(name: str, form: str, sizes: Sequence[Size]) -> int:
    """Run a named schedule in all those sizes; return how many there are."""
    found = list(schedules(name, sizes))
    for s in found:
        variant = s.num_ranks + 3 * s.num_microbatches
        given, merge = FORMS[form](s)
        try:
            world = world_of(given, variant, merge)
            run(world, world.programs(), last_first=variant % 2 == 1)
        except Exception as error:
            error.add_note(f"{name}, {form}: {s.num_ranks} ranks, {s.num_microbatches} microbatches")
            raise
    return len(found)


def count_allowed(name: str, sizes: Sequence[Size]) -> int:
    return sum(name != "dualpipe_v" or m >= 2 * p for p, m in sizes)


# --- the law --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", GENERATORS)
def test_every_schedule(name: str, form: str) -> None:
    """In `SMALL` sizes, and in the form that runs by default also in `LARGE`."""
    sizes = [*SMALL, *LARGE] if form == "as built" else SMALL
    assert run_all(name, form, sizes) == count_allowed(name, sizes)


@pytest.mark.full
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", GENERATORS)
def test_every_schedule_of_every_size(name: str, form: str) -> None:
    sizes = [size for size in SIZES if size not in SMALL]
    assert run_all(name, form, sizes) == count_allowed(name, sizes)


@pytest.mark.parametrize("stages_per_rank", [3, 4])
@pytest.mark.parametrize("name", [name for name, generator in GENERATORS.items() if generator.is_looped])
def test_more_stages_on_a_rank(name: str, stages_per_rank: int) -> None:
    for p, m in ((1, 3), (2, 5), (3, 4), (4, 8)):
        s = schedule.build(name, num_ranks=p, num_microbatches=m, stages_per_rank=stages_per_rank)
        for variant in range(6):
            world = world_of(s, variant)
            run(world, world.programs())


@pytest.mark.parametrize("name", GENERATORS)
def test_receives_posted_early_or_late(name: str) -> None:
    for receive_ahead in (0, 2, 5):
        for variant, s in enumerate(schedules(name, [(2, 4), (3, 7), (4, 8)])):
            world = world_of(s, variant, receive_ahead=receive_ahead)
            run(world, world.programs())


@pytest.mark.parametrize("unshard", ["once", "each_use"])
@pytest.mark.parametrize("name", GENERATORS)
def test_parameters_are_gathered_when_a_stage_computes(name: str, unshard: str) -> None:
    for variant, s in enumerate(schedules(name, [(1, 3), (2, 4), (3, 7), (4, 8)])):
        world = world_of(s, variant, unshard=unshard, unshard_ahead=variant, reduce_grads=True)
        run(world, world.programs())


def test_every_way_of_keeping() -> None:
    """Each stage with each way of keeping values, on both sides of a rank's boundary."""
    for name in ("1f1b", "zb_h1", "zbv", "interleaved_zb"):
        s = schedule.build(name, num_ranks=3, num_microbatches=6)
        for variant in range(12):
            world = world_of(s, variant)
            run(world, world.programs(), last_first=variant >= 6)


# --- the law can fail -----------------------------------------------------------------------------------------------


def example(**keeps: tuple[int, ...]) -> World:
    """Return ZB-H1 on three ranks, one value per boundary, every stage keeping the same."""
    s = schedule.lower(schedule.build("zb_h1", num_ranks=3, num_microbatches=6))
    stages = boundaries_of([[(1, True)], [(1, True)]])
    memory = {index: StageBytes((4,) if index < 2 else (), (4,) if index < 2 else (), 100, 10, 1000) for index in range(3)}
    return World(s, stages, memory | {1: replace(memory[1], **keeps)})


def of_other(world: World, **changes: Any) -> list[Program]:
    """Return programs of a different world than the one they will run in."""
    return replace(world, **changes).programs()


def moved(world: World, rank: int, what: str, before: str) -> World:
    """Move an action of a row right before another."""
    row = list(world.schedule[rank])
    action = row.pop(next(place for place, action in enumerate(row) if str(action) == what))
    row.insert(next(place for place, action in enumerate(row) if str(action) == before), action)
    rows = [*world.schedule.rows]
    rows[rank] = Row(as_table(row))
    return replace(world, schedule=replace(world.schedule, rows=tuple(rows)))


KEPT_FOR_BACKWARD = {"kept_inputs": (0,)}
KEPT_FOR_WEIGHTS = {"kept_inputs": (0,), "weight_inputs": (0,)}
COTANGENT_KEPT = {"weight_cotangents": (0,)}


@pytest.mark.parametrize(
    ("keeps", "said"),
    [
        (KEPT_FOR_BACKWARD, {}),
        (KEPT_FOR_WEIGHTS, {}),
        (KEPT_FOR_WEIGHTS, KEPT_FOR_BACKWARD),
        (COTANGENT_KEPT, {}),
    ],
    ids=["until I", "until W", "one kind too early", "a cotangent"],
)
def test_a_slot_freed_too_early(keeps: dict[str, tuple[int, ...]], said: dict[str, tuple[int, ...]]) -> None:
    world = example(**keeps)
    run(world, world.programs())
    with pytest.raises(PipelineRunError, match="is used after it was given away"):
        run(world, of_other(world, keeps=example(**said).keeps))


def test_a_slot_freed_too_late() -> None:
    world = example()
    with pytest.raises(AssertionError, match="slots, and how many are in use at once"):
        run(world, of_other(world, keeps=example(**KEPT_FOR_WEIGHTS).keeps))


def test_one_slot_for_all() -> None:
    world = example()
    with pytest.raises(PipelineRunError, match="is used after it was given away"):
        run(world, world.programs(), slots=lambda program: [Slot(program.slots[0])] * len(program.slots))


@pytest.mark.parametrize(
    ("rank", "what", "before", "message"),
    [
        (1, "1RECV_F1", "1RECV_F0", "stage 1 is given: expected .*'activation', 0, 0, 0.* found .*'activation', 0, 0, 1"),
        (0, "0RECV_B1", "0RECV_B0", "stage 0 is given: expected .*'cotangent', 0, 0, 0.* found .*'cotangent', 0, 0, 1"),
        (0, "0SEND_F0", "0F2", "stage 1 is given: expected .*'activation', 0, 0, 0.* found .*'activation', 0, 0, 1"),
        (2, "2W1", "2W0", r"sums of stage 2: expected .*\[0, 1, 2, 3, 4, 5\].* found .*\[1, 0, 2, 3, 4, 5\]"),
    ],
)
def test_an_action_before_another(rank: int, what: str, before: str, message: str) -> None:
    world = moved(example(), rank, what, before)
    with pytest.raises((PipelineRunError, AssertionError), match=message):
        run(world, world.programs())


def test_two_ops_swapped() -> None:
    world = example()
    programs = world.programs()
    row = list(map(str, world.schedule[0]))
    ops, here, there = list(programs[0].ops), row.index("0F0"), row.index("0F1")
    ops[here], ops[there] = ops[there], ops[here]
    with pytest.raises(PipelineRunError, match=r"1F0 .*stage 1 is given: .* found \[\('activation', 0, 0, 1\)\]"):
        run(world, [replace(programs[0], ops=tuple(ops)), *programs[1:]])


@pytest.mark.parametrize("how", ["never", "too early", "twice"])
def test_sends_settled_at_the_wrong_time(how: str) -> None:
    world = example()
    settled = [dict(each) for each in world.settled]
    position, sends = next(iter(settled[0].items()))
    if how == "never":
        del settled[0][position]
        message = "bytes alive after each action"
    elif how == "too early":
        settled[0] = {sends[0] + 1: sends[:1]}
        message = "is settled before it is done"
    else:
        settled[0][position] = [*sends, *sends]
        message = "settle"
    programs = world.programs(settled)
    with pytest.raises((PipelineRunError, AssertionError), match=message):
        run(world, programs)


def test_a_step_that_keeps_its_residuals() -> None:
    found: list[Residuals] = []

    class Holding(TokenStage):
        def backward_weight(self, weight_residuals: Residuals, sums: Any) -> None:
            super().backward_weight(weight_residuals, sums)
            found.append(weight_residuals)

    world = example()
    with pytest.raises(AssertionError, match="bytes alive after each action"):
        run(world, world.programs(), stage=Holding)


def test_a_rank_that_computes_without_parameters() -> None:
    world = world_of(schedule.build("zb_h1", num_ranks=3, num_microbatches=6), 0, unshard="once")
    world = moved(world, 1, "1UNSHARD", "1F1")
    with pytest.raises(PipelineRunError, match="stage 1 has no parameters"):
        run(world, world.programs())


def test_a_read_before_the_message_arrived() -> None:
    lease = Lease(Ledger(example().schedule, 0), Slot(((1,), torch.float32)))
    with pytest.raises(AssertionError, match="read before it has arrived"):
        _ = lease.name

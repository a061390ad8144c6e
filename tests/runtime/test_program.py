"""Programs: an op per action, registers that hold one value at a time, slots as long as a plan needs them."""

from __future__ import annotations

import weakref

import pytest
import torch

import autofunc as af
from autofunc.runtime.buffers import SlotPool
from autofunc.runtime.ops import Backward, BackwardInput, BackwardWeight, Forward, Op, Receive, Send
from autofunc.runtime.program import Layout, build_program
from autofunc.schedule import Kind, Schedule, StageBytes
from autofunc.schedule.effects import chain

COMPUTATIONS = {Kind.F: Forward, Kind.B: Backward, Kind.I: BackwardInput, Kind.W: BackwardWeight}
LAYOUT = ((2,), torch.float32)


def layouts_of(s: Schedule) -> dict[tuple[int, int], tuple[Layout, ...]]:
    pairs = [
        pair for edge in chain(s.num_stages) for pair in ((edge.producer, edge.consumer), (edge.consumer, edge.producer))
    ]
    return {(a, b): (LAYOUT,) for a, b in pairs if s.placement[a] != s.placement[b]}


def freed(op: Op) -> list[int]:
    """Return the registers that an op reads."""
    residuals = [op.residuals] if isinstance(op, (Backward, BackwardInput, BackwardWeight)) else []
    values = list(op.reads) if isinstance(op, (Forward, Backward, BackwardInput)) else []
    return [*residuals, *values, *([op.register] if isinstance(op, Send) else [])]


def filled(op: Op) -> list[int]:
    """Return the registers that an op writes."""
    kept = [op.keeps] if isinstance(op, (Forward, BackwardInput)) and op.keeps is not None else []
    values = list(op.writes) if isinstance(op, (Forward, Backward, BackwardInput)) else []
    return [*kept, *values, *([op.register] if isinstance(op, Receive) else [])]


@pytest.mark.parametrize("forward_only", [False, True])
@pytest.mark.parametrize("name", af.schedule.names())
def test_a_register_holds_one_value_at_a_time(name: str, forward_only: bool) -> None:
    for num_ranks, num_microbatches in ((1, 3), (2, 4), (4, 8)):
        s = af.schedule.build(name, num_ranks=num_ranks, num_microbatches=num_microbatches)
        lowered = af.schedule.lower(s.forward_form() if forward_only else s)
        keeps = dict.fromkeys(range(s.num_stages), StageBytes((8,), (8,), 0, 0, 0))
        for rank, settled in enumerate(af.schedule.settled_sends(lowered)):
            program = build_program(lowered, rank, chain(s.num_stages), layouts_of(s), keeps, settled)
            full: set[int] = set()
            in_flight: set[int] = set()
            sent: list[int] = []
            for position, (op, action) in enumerate(zip(program.ops, lowered[rank], strict=True)):
                assert (op.position, op.stage) == (position, action.stage)
                assert type(op) is COMPUTATIONS.get(action.kind, Send if action.kind.is_send else Receive)
                read, written = freed(op), filled(op)
                assert full.issuperset(read) and len(set(read)) == len(read)
                full -= set(read)
                assert not full.intersection(written) and len(set(written)) == len(written)
                full |= set(written)
                if isinstance(op, (Forward, Backward, BackwardInput)):
                    assert in_flight.intersection(read) == set(op.waits), "it waits for what was received, and nothing else"
                    in_flight -= set(op.waits)
                    assert set(op.settles) <= set(sent)
                    sent = [number for number in sent if number not in op.settles]
                elif isinstance(op, Send):
                    sent.append(op.number)
                elif isinstance(op, Receive):
                    in_flight.add(op.register)
                assert max(full, default=-1) < program.num_registers
            assert not full and not in_flight


def test_slots_of_all_plans_share_the_memory_of_the_largest() -> None:
    pool, cpu = SlotPool(), torch.device("cpu")
    large, small, other = ((8, 3), torch.float64), ((5,), torch.bfloat16), ((2, 2), torch.int64)
    first = pool.tensors([small, large, other], cpu)
    assert [(tuple(slot.shape), slot.dtype) for slot in first] == [small, large, other]
    held = 8 * 3 * 8 + 2 * 2 * 8 + 5 * 2
    assert pool.num_bytes == held
    for number, slot in enumerate(first):
        slot.fill_(number + 1)
    assert [slot.sum().item() for slot in first] == [5, 48, 12], "no two are in the same memory"
    assert pool.tensors([small, large, other], cpu) is first, "nothing is made in a step that was run before"
    for layouts in ([other], [small, small], [other, large], [((0,), torch.float32)], []):
        assert [(tuple(slot.shape), slot.dtype) for slot in pool.tensors(layouts, cpu)] == layouts
    assert pool.num_bytes == held
    alive = weakref.ref(first[1])
    del first, slot
    larger = pool.tensors([((16, 3), torch.float64)], cpu)
    assert pool.num_bytes == held + 8 * 3 * 8 and larger[0].shape == (16, 3)
    assert alive() is None, "what lies in a buffer that is made anew goes with it"

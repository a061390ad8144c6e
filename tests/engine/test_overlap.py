"""Two interleaved pieces: which runs when, and that each computes what it computes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from autofunc.engine.emit import emit, emit_interleaved
from autofunc.engine.overlap import run_interleaved
from autofunc.engine.partition import Piece
from autofunc.engine.turns import turns_of
from autofunc.graph.exchanges import at_once, exchanges

EVENTS: list[str] = []

torch.library.define("autofunc_test::swapped", "(Tensor x, str name) -> Tensor")
torch.library.define("autofunc_test::worked", "(Tensor x, str name) -> Tensor")


def _begin(x: Tensor, name: str) -> Callable[[], Tensor]:
    """Begin an exchange: its result exists only once waited for."""
    EVENTS.append(f"begin {name}")
    found = torch.full_like(x, torch.nan)

    def wait() -> Tensor:
        EVENTS.append(f"wait {name}")
        return found.copy_(-x)

    return wait


def _work(x: Tensor, name: str) -> Tensor:
    EVENTS.append(name)
    return x * 2 + 1


for _name, _made in (("swapped", at_once(_begin)), ("worked", _work)):
    torch.library.impl(f"autofunc_test::{_name}", "CompositeExplicitAutograd", _made)
    torch.library.register_fake(f"autofunc_test::{_name}", lambda x, name: torch.empty_like(x))
exchanges(torch.ops.autofunc_test.swapped.default, _begin)


def piece_of(side: str, kinds: str, *, adds: bool = False) -> tuple[Piece, list[fx.Node]]:
    """A chain of nodes: "x" exchanges, "w" works; its last value is returned, or added to an accumulator."""
    graph = fx.Graph()
    last = given_in = graph.placeholder("x")
    last.meta["val"] = torch.empty(2)
    for number, kind in enumerate(kinds):
        operator = torch.ops.autofunc_test.swapped if kind == "x" else torch.ops.autofunc_test.worked
        last = graph.call_function(operator.default, (last, f"{side}{number}"))
        last.meta["val"] = torch.empty(2)
    returned = [] if adds else [last]
    return Piece([], [given_in], returned, [(0, last)] if adds else []), list(graph.nodes)


def nodes_of(piece: tuple[Piece, list[fx.Node]]) -> list[fx.Node]:
    return piece[1][1:]


def run(left: Any, right: Any) -> tuple[list[Any], Tensor]:
    """Run both interleaved, on fresh arguments; return the accumulator of the second too."""
    total, sides = torch.ones(2), (left, right)
    stops, second_begins = turns_of(nodes_of(left), nodes_of(right))
    functions = [emit_interleaved(piece, order, {}, "piece", own) for (piece, order), own in zip(sides, stops, strict=True)]
    for _ in range(2):  # the first call looks at how values lie, and waits at once
        EVENTS.clear()
        total.fill_(1)
        given_to = [[torch.arange(2.0)], [torch.arange(2.0), *([total] if right[0].adds else [])]]
        both = [function(each) for function, each in zip(functions, given_to, strict=True)]
        found = run_interleaved((both[0], both[1]), second_begins, lambda side, waits: None)
    return found, total


def test_one_computes_while_the_other_waits() -> None:
    run(piece_of("f", "wxwxw"), piece_of("b", "wxw"))
    assert EVENTS == [
        "f0", "begin f1", "b0", "begin b1", "wait f1", "f2", "begin f3", "wait b1", "b2", "wait f3", "f4",
    ]  # fmt: skip


def test_work_is_divided_among_the_exchanges_of_the_other() -> None:
    run(piece_of("f", "xxx"), piece_of("b", "wwwwww"))
    assert EVENTS == [
        "begin f0", "b0", "b1", "wait f0", "begin f1", "b2", "b3", "wait f1", "begin f2", "b4", "b5", "wait f2",
    ]  # fmt: skip


def test_the_second_begins_if_it_alone_exchanges() -> None:
    run(piece_of("f", "ww"), piece_of("b", "wxw"))
    assert EVENTS == ["b0", "begin b1", "f0", "f1", "wait b1", "b2"]


def test_an_exchanged_gradient_is_added_on_arrival() -> None:
    _, total = run(piece_of("f", "wxw"), piece_of("b", "wx", adds=True))
    assert torch.equal(total, 1 - (torch.arange(2.0) * 2 + 1))


@given(st.text("wx", min_size=1, max_size=8), st.text("wx", min_size=1, max_size=8))
def test_interleaving_does_not_change_results(f: str, b: str) -> None:
    """Operators keep their order too."""
    left, right = piece_of("f", f), piece_of("b", b)
    made, _ = run(left, right)
    events = list(EVENTS)
    for (piece, order), found, side in ((left, made[0], "f"), (right, made[1], "b")):
        EVENTS.clear()
        alone = emit(piece, order, {}, "piece")([torch.arange(2.0)])
        assert torch.equal(found[0], alone[0])
        assert [event for event in events if event.split()[-1][0] == side] == EVENTS


@settings(max_examples=25)
@given(*[st.lists(st.sampled_from("wx"), max_size=6)] * 2, *[st.lists(st.integers(0, 3), min_size=10, max_size=10)] * 2)
def test_the_order_of_exchanges_depends_only_on_their_numbers(
    f: list[str], b: list[str], more_f: list[int], more_b: list[int]
) -> None:
    """Ranks whose graphs differ otherwise begin exchanges in the same order."""

    def begun(f: str, b: str) -> list[str]:
        run(piece_of("f", f), piece_of("b", b))
        return [event[6] for event in EVENTS if event.startswith("begin")]

    def stretched(kinds: list[str], by: list[int]) -> str:
        return "w" * by[-1] + "".join(kind + "w" * count for kind, count in zip(kinds, by, strict=False))

    assert begun("".join(f), "".join(b)) == begun(stretched(f, more_f), stretched(b, more_b))


def test_a_failure_is_reported_for_the_running_turn() -> None:
    told: list[tuple[int, bool]] = []

    def fails() -> Any:
        yield None
        yield True
        raise ValueError("lost")

    def goes_on() -> Any:
        yield None

    with pytest.raises(ValueError, match="lost"):
        run_interleaved((fails(), goes_on()), False, lambda side, waits: told.append((side, waits)))
    assert told == [(0, False), (1, False), (0, False), (0, True)]

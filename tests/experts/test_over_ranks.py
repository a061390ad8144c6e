"""Routed experts over several ranks, simulated in one process, are those of one with all rows and all experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import autofunc as af
from autofunc.errors import BatchError
from autofunc.shard import expert_exchange
from tests.experts.cases import dense, make_case, routed
from tests.experts.simulated import on_ranks

CASES = [
    # ranks, tokens of each, experts, k, how experts are chosen
    (2, 5, 4, 2, "any"),
    (4, 3, 4, 1, "any"),
    (2, 6, 6, 2, "first"),  # all rows go to rank 0
    (4, 4, 8, 2, "last"),  # all to the last
    (3, 1, 3, 3, "any"),
]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_equals_one_process(case: tuple[Any, ...], exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_exchange, "_is_exact", lambda rows: exact)
    compare(*case)


@given(st.integers(2, 4), st.integers(1, 6), st.integers(1, 3), st.booleans(), st.data())
def test_equals_it_for_any_sizes(ranks: int, tokens: int, each: int, exact: bool, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, ranks * each))
    choose = data.draw(st.sampled_from(["any", "first", "last"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_exchange, "_is_exact", lambda rows: exact)
        compare(ranks, tokens, ranks * each, k, choose, data.draw(st.integers(0, 99)))


def compare(ranks: int, tokens: int, count: int, k: int, choose: str, seed: int = 0) -> None:
    """Outputs, gradients of rows and weights, and of parameters summed over ranks."""
    x, chosen, weights, params = make_case(ranks * tokens, count, k, choose, seed)
    cotangent = torch.randn(ranks * tokens, 4, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    expected = dense(x, chosen, weights, params, count)
    wanted = torch.autograd.grad(expected, [x, weights, *params.values()], cotangent)

    def run(rank: int) -> tuple[Tensor, ...]:
        own = [part.chunk(ranks)[rank].detach() for part in (x, weights, cotangent)]
        mine = {name: leaf.chunk(ranks)[rank].detach().requires_grad_() for name, leaf in params.items()}
        leaves = [own[0].requires_grad_(), own[1].requires_grad_(), *mine.values()]
        made = routed(own[0], chosen.chunk(ranks)[rank], own[1], mine, count)
        return made, *torch.autograd.grad(made, leaves, own[2])

    found, _ = on_ranks(ranks, run)
    for one, parts in zip((expected, *wanted), zip(*found, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(parts), one, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("exact", [True, False])
def test_what_is_sent(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU the rows that there are; elsewhere, where the host does not know, as many between any two ranks."""
    monkeypatch.setattr(expert_exchange, "_is_exact", lambda rows: exact)
    ranks, tokens, k = 2, 6, 2
    x, chosen, weights, params = make_case(ranks * tokens, 4, k, "first")

    def run(rank: int) -> None:
        mine = {name: leaf.chunk(ranks)[rank] for name, leaf in params.items()}
        rows = x.chunk(ranks)[rank]
        made = routed(rows, chosen.chunk(ranks)[rank], weights.chunk(ranks)[rank], mine, 4)
        torch.autograd.grad(made.sum(), [x, *params.values()])

    _, peers = on_ranks(ranks, run)
    pairs = tokens * k
    if exact:  # all go to rank 0: it sends none back but those that came
        assert [each.sent_rows for each in peers] == [[pairs, 2 * pairs] * 2, [pairs, 0] * 2]
    else:
        assert [each.sent_rows for each in peers] == [[ranks * pairs] * 4] * 2


def test_the_mean_is_over_all_ranks() -> None:
    values = torch.arange(6.0, dtype=torch.float64).view(3, 2)

    def run(rank: int) -> tuple[Tensor, Tensor]:
        leaf = values[rank].clone().requires_grad_()
        mean = af.mean_over_expert_ranks(leaf)
        return mean.detach(), torch.autograd.grad((mean * (rank + 1)).sum(), leaf)[0]

    for mean, grad in on_ranks(3, run)[0]:
        assert torch.equal(mean, values.mean(0))
        torch.testing.assert_close(grad, torch.full_like(grad, 2.0))  # (1 + 2 + 3) / 3


def test_ranks_with_other_numbers_of_rows_are_refused() -> None:
    x, chosen, weights, params = make_case(5, 4, 2, "any")

    def run(rank: int) -> Tensor:
        rows = slice(0, 2) if rank else slice(2, 5)
        mine = {name: leaf.chunk(2)[rank] for name, leaf in params.items()}
        return routed(x[rows], chosen[rows], weights[rows], mine, 4)

    with pytest.raises(BatchError, match="ranks that share experts have 6, 4 pairs"):
        on_ranks(2, run)

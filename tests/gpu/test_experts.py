"""Routed experts on a GPU: its kernel for groups of rows, an exchange without known counts, and a host that never waits."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import autofunc as af
from tests.experts.simulated import on_ranks

pytestmark = pytest.mark.gpu

COUNT, K, WIDTH, HIDDEN = 8, 2, 64, 128


def case(tokens: int, dtype: torch.dtype, choose: str = "any") -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """(x, chosen, weights, parameters of all experts) on the GPU."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(tokens, COUNT, generator=generator)
    chosen = (scores + (torch.arange(COUNT) * 2 if choose == "last" else 0)).topk(K).indices
    sizes = [(tokens, WIDTH), (tokens, K), (COUNT, HIDDEN, WIDTH), (COUNT, WIDTH, HIDDEN)]
    x, weights, *params = (torch.randn(size, generator=generator).div(4).to("cuda", dtype) for size in sizes)
    for leaf in (x, weights, *params):
        leaf.requires_grad_()
    return x, chosen.cuda(), weights, params


def routed(x: Tensor, chosen: Tensor, weights: Tensor, params: list[Tensor]) -> Tensor:
    def expert(rows: Tensor, groups: af.Groups) -> Tensor:
        return groups.linear(functional.silu(groups.linear(rows, params[0])), params[1])

    return af.routed_experts(x, chosen, weights, COUNT, expert)


def dense(x: Tensor, chosen: Tensor, weights: Tensor, params: list[Tensor]) -> Tensor:
    share = torch.zeros(len(x), COUNT, dtype=x.dtype, device=x.device).scatter(1, chosen, weights)
    hidden = functional.silu(torch.einsum("nd,efd->nef", x, params[0]))
    return (torch.einsum("nef,edf->ned", hidden, params[1]) * share.unsqueeze(-1)).sum(1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("choose", ["any", "last"])  # the last: six experts get nothing
def test_equals_all_experts_on_all_tokens(dtype: torch.dtype, tolerance: float, choose: str) -> None:
    given = case(50, dtype, choose)
    exact = [leaf.detach().double().requires_grad_() for leaf in (given[0], given[2], *given[3])]
    leaves = [given[0], given[2], *given[3]]
    expected = dense(exact[0], given[1], exact[1], exact[2:])
    found = routed(*given)
    cotangent = torch.randn(found.shape, device="cuda").to(dtype)
    pairs = zip(
        [found, *torch.autograd.grad(found, leaves, cotangent)],
        [expected, *torch.autograd.grad(expected, exact, cotangent.double())],
        strict=True,
    )
    for one, other in pairs:
        assert (one.double() - other).abs().max() <= tolerance * other.abs().max()


def test_the_host_waits_for_nothing_in_bf16() -> None:
    given = case(64, torch.bfloat16)
    made = routed(*given)  # once before: libraries are loaded
    torch.autograd.grad(made.sum(), given[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode warns once that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        made = routed(*given)
        torch.autograd.grad(made.sum(), [given[0], given[2], *given[3]])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_over_ranks_that_know_no_counts() -> None:
    ranks, tokens = 4, 12
    x, chosen, weights, params = case(ranks * tokens, torch.float32, "last")
    leaves = [x, weights, *params]
    expected = routed(x, chosen, weights, params)
    cotangent = torch.randn(expected.shape, device="cuda")
    whole = torch.autograd.grad(expected, leaves, cotangent)

    def run(rank: int) -> tuple[Tensor, ...]:
        own = [leaf.chunk(ranks)[rank].detach().requires_grad_() for leaf in leaves]
        # each rank's backward in its own thread: autograd has one for all of a device, in which ranks could not meet
        with torch.autograd.set_multithreading_enabled(False):
            made = routed(own[0], chosen.chunk(ranks)[rank], own[1], own[2:])
            return made.detach(), *torch.autograd.grad(made, own, cotangent.chunk(ranks)[rank])

    found, _ = on_ranks(ranks, run)
    for one, parts in zip((expected, *whole), zip(*found, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(parts), one, rtol=1e-4, atol=1e-4)

"""Routed experts beside a dense form, in which every expert computes all tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

import autofunc as af

SIZES = [
    # tokens, experts, k, how experts are chosen
    (1, 1, 1, "any"),
    (5, 4, 1, "any"),
    (7, 6, 3, "any"),
    (6, 4, 2, "first"),  # of all tokens the same ones: others get none
    (9, 8, 8, "any"),  # every token all of them
    (12, 8, 2, "last"),
]


def make_case(
    tokens: int, count: int, k: int, choose: str, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """(x, chosen, weights, parameters of all experts), all but `chosen` leaves that need gradients."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, count, generator=generator)
    places = torch.arange(count)
    scores = scores if choose == "any" else scores + (places if choose == "last" else -places) * 2
    sizes = {"up": (count, 6, 5), "up_bias": (count, 6), "down": (count, 6, 4), "down_bias": (count, 4)}
    made = {name: torch.randn(size, generator=generator, dtype=dtype) for name, size in sizes.items()}
    x = torch.randn(tokens, 5, generator=generator, dtype=dtype)
    weights = torch.rand(tokens, k, generator=generator, dtype=dtype)
    for leaf in (x, weights, *made.values()):
        leaf.requires_grad_()
    return x, scores.topk(k).indices, weights, made


def routed(x: Tensor, chosen: Tensor, weights: Tensor, params: Mapping[str, Tensor], count: int) -> Tensor:
    """Weights of both layouts, and biases."""

    def expert(rows: Tensor, groups: af.Groups) -> Tensor:
        hidden = functional.silu(groups.linear(rows, params["up"], params["up_bias"]))
        return groups.matmul(hidden, params["down"], params["down_bias"])

    return af.routed_experts(x, chosen, weights, count, expert)


def dense(x: Tensor, chosen: Tensor, weights: Tensor, params: Mapping[str, Tensor], count: int) -> Tensor:
    """All experts on all tokens."""
    share = torch.zeros(len(x), count, dtype=x.dtype).scatter(1, chosen, weights)
    hidden = functional.silu(torch.einsum("nd,efd->nef", x, params["up"]) + params["up_bias"])
    made = torch.einsum("nef,efo->neo", hidden, params["down"]) + params["down_bias"]
    return (made * share.unsqueeze(-1)).sum(1)


def gradients(made: Tensor, leaves: list[Tensor], seed: int = 1) -> list[Tensor]:
    """Of a sum in which every number of the result counts differently."""
    cotangent = torch.randn(made.shape, generator=torch.Generator().manual_seed(seed), dtype=made.dtype)
    return list(torch.autograd.grad(made, leaves, cotangent))

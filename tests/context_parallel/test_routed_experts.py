"""Routed experts on cut tokens: a rank's tokens go to its own copy of the experts; a router counts all tokens."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import autofunc as af
from stages.moe import build_moe_model, moe_causal_lm
from tests.context_parallel.test_layers import batch_of, check, linear, refused, squared_error, toy

EXPERTS, K = 3, 2


def _route(p: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens of all rows in one dim, probabilities of experts, and the chosen ones with their weights."""
    flat = x.flatten(0, 1)
    probability = functional.linear(flat, p["weight"][:EXPERTS]).softmax(-1)
    weights, chosen = probability.topk(K)
    return flat, probability, chosen, weights


def routed(p: Mapping[str, Tensor], x: Tensor, batch: Any, mix: Any = lambda rows, flat: rows) -> Tensor:
    """Experts that share weights, with a bias each."""
    flat, _, chosen, weights = _route(p, x)
    all_of_them = torch.stack([p["weight"], p["weight"].t(), p["weight"] * p["bias"]])

    def expert(rows: Tensor, groups: af.Groups) -> Tensor:
        hidden = groups.linear(rows, all_of_them, all_of_them[:, 0])
        gate, up = mix(hidden, flat).chunk(2, -1)
        return groups.matmul(functional.silu(torch.cat([up, gate], -1)), all_of_them)

    return linear(p, af.routed_experts(flat, chosen, weights, EXPERTS, expert).view(x.shape)) + x


def balanced(how: str, p: Mapping[str, Tensor], x: Tensor, batch: Any) -> Tensor:
    """The share of tokens that chose an expert times its mean probability, counted as libraries do."""
    _, probability, chosen, _ = _route(p, x)
    mask = batch["mask"].flatten().to(x.dtype)
    pairs, none = chosen.flatten(), torch.zeros(EXPERTS, dtype=x.dtype)
    if how == "one_hot":
        counts = functional.one_hot(chosen, EXPERTS).sum((0, 1)).to(x.dtype)
    elif how == "histc":
        counts = none + torch.histc(pairs.to(x.dtype), EXPERTS, 0, EXPERTS)
    else:
        counts = none.scatter_add(0, pairs, mask.repeat_interleave(K))
        probability = probability * mask[:, None]
    total = mask.sum() if how == "scatter_add" else len(pairs) // K
    return x + (counts / total * (probability.sum(0) / total)).sum()


def test_experts() -> None:
    assert check(toy(routed), squared_error, batch_of()) == {}, "nothing is exchanged"


@pytest.mark.parametrize("how", ["one_hot", "histc", "scatter_add"])
def test_balance_losses_of_a_router(how: str) -> None:
    counts = check(toy(partial(balanced, how)), squared_error, batch_of())
    assert counts["gather"] == 3, "counts and probabilities, and the gradient of these"


def test_mixtral_of_functions() -> None:
    model = build_moe_model(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.3,
    )  # fmt: skip
    check(model, partial(moe_causal_lm, router_aux_loss_coef=0.1), batch_of(), method="ring", exact=1e-6)


@pytest.mark.parametrize(
    ("mix", "operator"),
    [
        (lambda rows, flat: rows + flat.repeat_interleave(K, 0), "aten.add"),
        (lambda rows, flat: (rows @ rows.t()) @ rows, "aten.mm|aten.matmul"),
        (lambda rows, flat: rows - rows.mean(0), "aten.mean"),
        (lambda rows, flat: rows.flip(0), "aten.flip"),
    ],
    ids=["beside tokens", "with each other", "reduced", "moved"],
)
def test_rows_of_experts_meet_nothing_else(mix: Any, operator: str) -> None:
    message = refused(partial(routed, mix=mix))
    assert any(f"runs {each}" in message for each in operator.split("|")), message

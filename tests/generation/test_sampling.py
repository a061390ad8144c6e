"""How the next token is drawn."""

from __future__ import annotations

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from autofunc.generation.sampling import Sampling, next_tokens, probabilities

LOGITS = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * 2


def test_drawn_from_what_transformers_draws_from() -> None:
    for temperature, top_k, top_p in ((0.7, None, 0.8), (1.0, 5, None), (1.3, 12, 0.6), (1.0, None, 1e-6), (2.0, 100, 1.0)):
        warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        if top_k is not None:
            warpers.append(TopKLogitsWarper(top_k))
        if top_p is not None:
            warpers.append(TopPLogitsWarper(top_p))
        expected = warpers(torch.zeros(1, 1), LOGITS).softmax(-1)
        found = probabilities(LOGITS, Sampling(temperature, top_k, top_p))
        torch.testing.assert_close(found / found.sum(-1, keepdim=True), expected)


def test_a_draw_is_a_function_of_seed_step_and_row() -> None:
    sampling = Sampling(temperature=1.0, seed=5)
    whole = next_tokens(LOGITS, sampling, 3)
    assert torch.equal(next_tokens(LOGITS[:7], sampling, 3), whole[:7]), "of no other rows"
    assert not torch.equal(next_tokens(LOGITS, sampling, 4), whole)
    assert not torch.equal(next_tokens(LOGITS, Sampling(temperature=1.0, seed=6), 3), whole)
    assert torch.equal(next_tokens(LOGITS, Sampling(), 0), LOGITS.argmax(-1))
    assert torch.equal(next_tokens(LOGITS, Sampling(top_k=1), 0), LOGITS.argmax(-1))


def test_tokens_come_up_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, 4)
    for how, expected in (
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_p": 0.6}, [0.625, 0.375, 0, 0]),
        ({"top_k": 1}, [1, 0, 0, 0]),
    ):
        counts = torch.bincount(next_tokens(logits, Sampling(1.0, **how), 0), minlength=4) / 4000
        torch.testing.assert_close(counts, torch.tensor(expected, dtype=torch.float32), atol=0.03, rtol=0)

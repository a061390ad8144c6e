"""Tokens are generated where the parameters are."""

from __future__ import annotations

import pytest
import torch

import autofunc as af
from tests.generation.test_transformers import NEW, by_transformers, llama, prompts

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_tokens_of_transformers(num_ranks: int) -> None:
    """Of a captured Llama: those of transformers on the same device, and of this library on the CPU."""
    torch.manual_seed(1)
    module = llama()
    model = af.from_module(module, {"input_ids": torch.zeros(2, 8, dtype=torch.long)})
    s = af.schedule.build("1f1b", num_ranks=num_ranks, num_microbatches=4)
    pipe = af.pipeline(af.split(model, num_ranks), s, loss=af.losses.causal_lm)
    rows = prompts()
    made = af.generate(pipe, pipe.init(device="cuda"), rows, max_new_tokens=NEW)
    assert made == af.generate(pipe, pipe.init(), rows, max_new_tokens=NEW)
    assert made == by_transformers(module, rows)

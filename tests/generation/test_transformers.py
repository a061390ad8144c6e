"""Generated tokens are those of transformers' own `generate`, in any layout."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import autofunc as af
from autofunc.captured import captures
from autofunc.errors import AutofuncError, BatchError
from autofunc.pipe import Pipeline
from autofunc.runtime import build

VOCABULARY, ROWS, NEW = 96, (5, 1, 9), 12
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 40}
ENDS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
RANGE = {"initializer_range": 0.3}  # so that the tokens before count, and not the last alone


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, **ENDS, **RANGE))


def mistral() -> nn.Module:
    """A window that ends before the texts do."""
    return MistralForCausalLM(MistralConfig(**SIZES, **HEADS, **ENDS, **RANGE, sliding_window=6))


def gpt2() -> nn.Module:
    """Tied weights and learned positions; in train mode with dropout, which generating leaves out."""
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
    return GPT2LMHeadModel(GPT2Config(**sizes, **ENDS, **RANGE))


def prompts() -> list[list[int]]:
    drawn = random.Random(0)
    return [[drawn.randrange(2, VOCABULARY) for _ in range(count)] for count in ROWS]


def pipes_of(module: nn.Module, *num_ranks: int) -> list[tuple[Pipeline, Any]]:
    """Pipelines to train one model with, and parameters."""
    model = af.from_module(module, {"input_ids": torch.zeros(2, 8, dtype=torch.long)})
    made = []
    for count in num_ranks:
        schedule = af.schedule.build("1f1b", num_ranks=count, num_microbatches=4)
        pipe = af.pipeline(af.split(model, count), schedule, loss=af.losses.causal_lm)
        made.append((pipe, pipe.init()))
    return made


def by_transformers(module: nn.Module, rows: list[list[int]], eos: int | None = None) -> list[list[int]]:
    """Each prompt by itself."""
    found = []
    for row in rows:
        ids = torch.tensor([row])
        made = module.eval().generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, pad_token_id=0, eos_token_id=eos
        )
        found.append(made[0, len(row) :].tolist())
    return found


@pytest.mark.parametrize("make", [llama, gpt2, pytest.param(mistral, marks=pytest.mark.full)])
def test_tokens_of_transformers(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token for token, on one rank and on two; and nothing is captured for a token, or for a second text."""
    torch.manual_seed(1)
    module = make()
    rows = prompts()
    (one, params), (two, its_params) = pipes_of(module, 1, 2)
    made = af.generate(one, params, rows, max_new_tokens=NEW)
    expected = by_transformers(module, rows)
    assert made == expected
    assert af.generate(two, its_params, rows, max_new_tokens=NEW) == expected

    for owner, name in ((captures, "export"), (build, "capture")):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("captured again"))
    steps: list[int] = []
    others = [row[::-1] for row in rows]
    again = af.generate(two, its_params, others, max_new_tokens=NEW, on_step=steps.append)
    assert again == by_transformers(module, others) and steps == list(range(1, NEW + 1))
    _check_ends(module, two, its_params, rows, expected)
    _check_draws((one, params), (two, its_params), rows)
    _check_refused(one, params)


def _check_ends(module: nn.Module, pipe: Pipeline, params: Any, rows: list[list[int]], made: list[list[int]]) -> None:
    """A text ends after the token that ends it, whatever the others do."""
    eos = made[0][4]
    found = af.generate(pipe, params, rows, max_new_tokens=NEW, eos=eos)
    assert found == by_transformers(module, rows, eos)
    assert found[0] == made[0][: made[0].index(eos) + 1], "it ends in the middle"
    assert found == af.generate(pipe, params, rows, max_new_tokens=NEW, eos=[eos, VOCABULARY])


def _check_draws(one: tuple[Pipeline, Any], two: tuple[Pipeline, Any], rows: list[list[int]]) -> None:
    """Drawn tokens depend on (seed, step, row), not on the layout."""
    how: dict[str, Any] = {"max_new_tokens": NEW, "temperature": 1.5, "top_p": 0.9, "top_k": 40}
    made = af.generate(*one, rows, **how, seed=3)
    assert made == af.generate(*two, rows, **how, seed=3) != af.generate(*two, rows, **how, seed=4)
    assert af.generate(*one, rows, max_new_tokens=NEW, temperature=0) == af.generate(*one, rows, max_new_tokens=NEW)


def _check_refused(pipe: Pipeline, params: Any) -> None:
    cases: list[tuple[Any, dict[str, Any], type[AutofuncError], str]] = [
        ([], {}, BatchError, "expected a list of prompts"),
        ([[1], []], {}, BatchError, "prompt 1 has no tokens"),
        ("text", {}, BatchError, "expected a list of prompts"),
        ([[1, 2.5]], {}, BatchError, "prompt 0 has 2.5"),
        ([[1, VOCABULARY]], {}, BatchError, f"vocab_size={VOCABULARY}"),
        ([[1] * 30], {}, AutofuncError, "positions for 40 tokens.* max_new_tokens=10 fits"),
        ([[1]], {"max_new_tokens": 0}, AutofuncError, "max_new_tokens=0: expected 1 or more"),
        ([[1]], {"temperature": -1.0}, AutofuncError, "temperature=-1.0"),
        ([[1]], {"top_p": 1.5}, AutofuncError, "top_p=1.5"),
        ([[1]], {"top_k": 0}, AutofuncError, "top_k=0"),
    ]
    for rows, more, kind, said in cases:
        with pytest.raises(kind, match=said):
            af.generate(pipe, params, rows, **{"max_new_tokens": NEW, **more})

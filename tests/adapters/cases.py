"""Small models with adapters."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import autofunc as af
from autofunc.tree import flatten, to_tensordict
from tests.cases import make_case

ROWS, TOKENS, VOCABULARY = 4, 5, 17


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=2, **sizes))


def gpt2() -> GPT2LMHeadModel:
    """Its linear maps are `Conv1D`, whose weights are (in, out)."""
    torch.manual_seed(0)
    sizes = {"n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes))


def batch_of_ids() -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


@cache
def bases() -> dict[str, tuple[af.Model, Any, dict[str, Tensor]]]:
    """By name: model, loss, batch."""
    named, _, loss, batch = make_case("gpt2", 1, ROWS, 2)
    captured = {"llama": llama(), "gpt2": gpt2()}
    return {
        "layers": (named, loss, batch),
        **{name: (af.from_module(module, batch_of_ids()), None, batch_of_ids()) for name, module in captured.items()},
    }


def with_values(model: af.Model, seed: int = 7) -> Any:
    """Initial parameters, but that B is not zero, so that A has gradients."""
    flat = flatten(model.init(seed=seed)) if model.uses_seed else flatten(model.init())
    generator = torch.Generator().manual_seed(seed)
    for path, leaf in flat.items():
        if ".lora_B." in path:
            flat[path] = 0.1 * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
    return to_tensordict(flat)

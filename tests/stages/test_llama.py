"""Llama's logits are those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autofunc.tree import flatten, to_tensordict
from stages.llama import build_llama_model

SIZES: dict[str, Any] = {
    "vocab_size": 19,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_those_of_transformers(tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied, rms_norm_eps=1e-6)).eval()
    model = build_llama_model(**SIZES, tie_word_embeddings=tied)
    state = {name.removeprefix("model."): leaf for name, leaf in theirs.state_dict().items()}
    params = to_tensordict({path: state[path] for path in flatten(model.init(device="meta"))})
    ids = torch.randint(0, 19, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(model(params, {"input_ids": ids}), theirs(ids).logits, rtol=1e-5, atol=1e-6)

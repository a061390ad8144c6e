"""Small models of transformers, as they are, with random weights, and batches for them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

_SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 32}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "use_cache": False}


def model_of(name: str, **changed: Any) -> nn.Module:
    """A module of two layers, of 4 heads, and 2 of keys where there may be fewer."""
    warnings.filterwarnings("ignore")
    import transformers as t

    torch.manual_seed(0)
    if name == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(**{**_GROUPED, **changed}))
    raise KeyError(name)


def batch_of(name: str) -> dict[str, Tensor]:
    """Four rows of eight tokens."""
    ids = torch.randint(1, 32, (4, 8), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}

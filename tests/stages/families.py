"""Small models of transformers with random weights, and how each is built here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import autofunc as af
from stages import encoder_decoder, gpt2, llama, moe

VOCABULARY = 19
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
T5_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 9,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@dataclass(frozen=True)
class Family:
    """A kind of model: the name of its classes in transformers, our module, and what makes it this kind."""

    kind: str
    module: ModuleType
    build: Callable[..., af.Model]
    settings: dict[str, Any] = field(default_factory=dict)
    loss: Any = af.losses.causal_lm

    def theirs(self) -> Any:
        """Build their model; norms, biases and an untied head are random too."""
        torch.manual_seed(0)
        head = "ForConditionalGeneration" if self.kind == "T5" else "LMHeadModel" if self.kind == "GPT2" else "ForCausalLM"
        config = getattr(transformers, f"{self.kind}Config")(**self.settings)
        module = getattr(transformers, self.kind + head)(config).eval()
        if self.settings.get("tie_word_embeddings") is False:
            module.lm_head.weight = nn.Parameter(torch.empty_like(module.lm_head.weight))
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.4)
        return module

    def ours(self, theirs: nn.Module) -> tuple[af.Model, Any]:
        """Build our model from their configuration, with their weights."""
        model = self.build(**vars(self.module.config_from_hf(theirs.config)))
        return model, self.module.from_hf(theirs.state_dict(), model.config)

    def batch(self, rows: int) -> dict[str, Tensor]:
        """Make a batch with labels, a different number in each row."""
        generator = torch.Generator().manual_seed(rows)
        ids = torch.randint(0, VOCABULARY, (rows, 13), generator=generator)
        labels = ids[:, 1:].clone()
        for row in range(rows):
            labels[row, : row % 5] = -100
        batch = {"input_ids": ids[:, :-1], "labels": labels}
        if self.kind != "T5":
            return batch
        mask = torch.ones(rows, 12, dtype=torch.int64)
        mask[::2, -3:] = 0
        decoder_ids = torch.randint(0, VOCABULARY, (rows, 7), generator=generator)
        return {**batch, "attention_mask": mask, "decoder_input_ids": decoder_ids, "labels": labels[:, :7]}


def _llama(kind: str, **settings: Any) -> Family:
    return Family(kind, llama, llama.build_llama_model, {**SIZES, **settings})


def _t5(**settings: Any) -> Family:
    return Family("T5", encoder_decoder, encoder_decoder.build_encoder_decoder_model, {**T5_SIZES, **settings})


FAMILIES = {
    "gpt2": Family(
        "GPT2",
        gpt2,
        gpt2.build_gpt2_model,
        {"vocab_size": VOCABULARY, "n_positions": 12, "n_embd": 16, "n_layer": 3, "n_head": 2},
    ),
    "llama": _llama("Llama"),
    "llama tied": _llama("Llama", tie_word_embeddings=True, attention_bias=True, head_dim=6),
    "llama 3": _llama("Llama", rope_parameters=LLAMA3, head_dim=16),  # so many features have wavelengths of all three kinds
    "llama linear": _llama("Llama", rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}),
    "qwen3": _llama("Qwen3", head_dim=6, rms_norm_eps=1e-5, tie_word_embeddings=True),
    "mistral": _llama("Mistral", sliding_window=12),
    "mistral window": _llama("Mistral", sliding_window=4),
    "mixtral": Family(
        "Mixtral",
        moe,
        moe.build_moe_model,
        {**SIZES, "num_local_experts": 5, "num_experts_per_tok": 2},
        loss=moe.moe_causal_lm,
    ),
    "t5 v1.0": _t5(),
    "t5 v1.1": _t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
}

"""Unmodified `transformers` models with small random configurations, and a batch for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 96
ROWS, TOKENS = 4, 12


def _ids(seed: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(seed))


def text() -> dict[str, Tensor]:
    """Token ids and labels, which models shift themselves."""
    return {"input_ids": _ids(0), "labels": _ids(0)}


def pairs() -> dict[str, Tensor]:
    """Of an encoder and a decoder, the first with padding."""
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    mask[0, 9:] = mask[3, 5:] = 0
    return {"input_ids": _ids(0), "attention_mask": mask, "decoder_input_ids": _ids(1), "labels": _ids(2)}


def padded() -> dict[str, Tensor]:
    """Token ids with padding."""
    return {**text(), "attention_mask": pairs()["attention_mask"]}


def images() -> dict[str, Tensor]:
    """Images, with a class each."""
    pixels = torch.randn(ROWS, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "labels": torch.tensor([0, 2, 1, 2])}


_SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": VOCABULARY,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _build(model: str, config: str, **options: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    built: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options))
    return built


ZOO: Mapping[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "gpt2": (
        lambda: _build(
            "GPT2LMHeadModel", "GPT2Config", n_layer=4, n_embd=32, n_head=4, vocab_size=VOCABULARY, n_positions=32,
            bos_token_id=1, eos_token_id=2, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
        ),
        text,
    ),
    "llama": (lambda: _build("LlamaForCausalLM", "LlamaConfig", **_GROUPED), text),
    "qwen3": (lambda: _build("Qwen3ForCausalLM", "Qwen3Config", head_dim=8, **_GROUPED), text),
    "mistral": (lambda: _build("MistralForCausalLM", "MistralConfig", sliding_window=5, **_GROUPED), text),
    "gemma": (lambda: _build("Gemma2ForCausalLM", "Gemma2Config", head_dim=8, sliding_window=5, **_GROUPED), text),
    "gpt_neox": (lambda: _build("GPTNeoXForCausalLM", "GPTNeoXConfig", **_SIZES), padded),
    "mixtral": (
        lambda: _build(
            "MixtralForCausalLM", "MixtralConfig", num_local_experts=4, num_experts_per_tok=2, output_router_logits=True,
            **_GROUPED,
        ),
        text,
    ),
    "t5": (
        lambda: _build(
            "T5ForConditionalGeneration", "T5Config", d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4,
            vocab_size=VOCABULARY, dropout_rate=0.0, decoder_start_token_id=0,
        ),
        pairs,
    ),
    "bert": (lambda: _build("BertForMaskedLM", "BertConfig", **_SIZES, **_NO_DROPOUT), padded),
    "vit": (
        lambda: _build(
            "ViTForImageClassification", "ViTConfig", hidden_size=32, intermediate_size=48, num_hidden_layers=4,
            num_attention_heads=4, image_size=16, patch_size=4, num_labels=3, **_NO_DROPOUT,
        ),
        images,
    ),
}  # fmt: skip
"""Name -> (builder, batch)."""

"""Small unmodified models of transformers with random weights, and batches for them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

_SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 32}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "use_cache": False}
_ROUTED = {
    **_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "output_router_logits": True,
    "router_aux_loss_coef": 0.1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def model_of(name: str, **changed: Any) -> nn.Module:
    """A module of two layers, of 4 heads, and 2 of keys where there may be fewer."""
    warnings.filterwarnings("ignore")
    import transformers as t

    torch.manual_seed(0)
    make = _MAKERS[name]
    return make(t, changed)


def _gpt2(t: Any, changed: dict[str, Any]) -> nn.Module:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 32, "n_positions": 16, "use_cache": False}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return t.GPT2LMHeadModel(t.GPT2Config(**{**sizes, **ends, **changed}))


def _t5(t: Any, changed: dict[str, Any]) -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "vocab_size": 32, "use_cache": False}
    return t.T5ForConditionalGeneration(t.T5Config(**{**sizes, "decoder_start_token_id": 0, "pad_token_id": 0, **changed}))


def _gemma3(t: Any, changed: dict[str, Any]) -> nn.Module:
    layers = {"head_dim": 4, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    return t.Gemma3ForCausalLM(t.Gemma3TextConfig(**{**_GROUPED, **layers, **changed}))


class Made(NamedTuple):
    """What a module returns; its loss is the model's."""

    loss: Tensor
    logits: Tensor


class TorchLayers(nn.Module):
    """Layers of torch itself: an encoder that sees padding, and a decoder that is causal, on what it made."""

    def __init__(self, decodes: bool = True, batch_first: bool = True, heads: int = 4, **options: Any) -> None:
        super().__init__()
        sizes = {"d_model": 16, "nhead": heads, "dim_feedforward": 24, "batch_first": batch_first, **options}
        self.words = nn.Embedding(32, 16)
        self.encoder = nn.ModuleList(nn.TransformerEncoderLayer(**sizes) for _ in range(2))
        self.decoder = nn.ModuleList(nn.TransformerDecoderLayer(**sizes) for _ in range(2 * decodes))
        self.head = nn.Linear(16, 32)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Made:
        ahead = nn.Transformer.generate_square_subsequent_mask(input_ids.shape[1])
        x = self.words(input_ids)
        x = x if self.encoder[0].self_attn.batch_first else x.transpose(0, 1)
        for layer in self.encoder:
            x = layer(x, src_key_padding_mask=attention_mask == 0)
        y = x.flip(-1)
        for layer in self.decoder:
            y = layer(y, x, tgt_mask=ahead, tgt_is_causal=True)
        logits = self.head(y if self.encoder[0].self_attn.batch_first else y.transpose(0, 1))
        return Made(functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits)


class TorchAttention(nn.Module):
    """Keys and values of other widths, each with its own weight, beside one bias for all; attention is written out."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(32, 16)
        self.keys, self.values = nn.Embedding(32, 8), nn.Embedding(32, 12)
        self.attention = nn.MultiheadAttention(16, 4, kdim=8, vdim=12, batch_first=True)
        self.head = nn.Linear(16, 32)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Made:
        made, _ = self.attention(self.words(input_ids), self.keys(input_ids), self.values(input_ids))
        logits = self.head(made)
        return Made(functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits)


class Normed(nn.Module):
    """Normalises what one product makes and the next one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.up, self.norm = nn.Embedding(32, 16), nn.Linear(16, 24), nn.RMSNorm(24)
        self.down, self.head = nn.Linear(24, 16), nn.Linear(16, 32)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Made:
        x = self.words(input_ids)
        logits = self.head(x + self.down(functional.silu(self.norm(self.up(x)))))
        return Made(functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits)


_MAKERS: dict[str, Callable[[Any, dict[str, Any]], nn.Module]] = {
    "llama": lambda t, changed: t.LlamaForCausalLM(t.LlamaConfig(**{**_GROUPED, **changed})),
    "qwen3": lambda t, changed: t.Qwen3ForCausalLM(t.Qwen3Config(**{**_GROUPED, "head_dim": 4, **changed})),
    "gemma3": _gemma3,
    "phi3": lambda t, changed: t.Phi3ForCausalLM(t.Phi3Config(**{**_GROUPED, "pad_token_id": 0, **changed})),
    "mixtral": lambda t, changed: t.MixtralForCausalLM(t.MixtralConfig(**{**_GROUPED, "num_local_experts": 4, **changed})),
    "qwen3_moe": lambda t, changed: t.Qwen3MoeForCausalLM(
        t.Qwen3MoeConfig(**{**_ROUTED, "head_dim": 4, "norm_topk_prob": True, **changed})
    ),
    "olmoe": lambda t, changed: t.OlmoeForCausalLM(t.OlmoeConfig(**{**_ROUTED, **changed})),
    "bert": lambda t, changed: t.BertForMaskedLM(t.BertConfig(**{**_SIZES, "max_position_embeddings": 16, **changed})),
    "torch": lambda t, changed: TorchLayers(**changed),
    "normed": lambda t, changed: Normed(),
    "torch_attention": lambda t, changed: TorchAttention(**changed),
    "gpt2": _gpt2,
    "t5": _t5,
}


def batch_of(name: str) -> dict[str, Tensor]:
    """Four rows of eight tokens."""
    ids = torch.randint(0, 32, (4, 8), generator=torch.Generator().manual_seed(1))
    padded = {"attention_mask": (torch.arange(8) < torch.tensor([[8], [6], [8], [5]])).long()}
    return {"input_ids": ids, "labels": ids} | (padded if name in ("bert", "t5", "olmoe", "torch") else {})

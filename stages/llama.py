"""Llama: rotary positions, grouped-query attention, RMS norms, gated MLP.

Source: Touvron et al., "LLaMA", arXiv 2302.13971, section 2.2; grouped queries from Ainslie et al., arXiv 2305.13245; names
and numerics as in Hugging Face transformers, `models/llama/modeling_llama.py` (`LlamaForCausalLM`).

Shapes: B rows, T tokens, D = hidden_size, N heads, K key and value heads, H = head_dim, F = intermediate_size,
V vocabulary. Over tp ranks heads, MLP features and vocabulary are cut (`TENSOR_PARALLEL`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional

import autofunc as af
from autofunc.errors import ModelError

Params = Mapping[str, Any]

TENSOR_PARALLEL = {
    "embed_tokens.weight": "shard(0)",
    "*.self_attn.[qkv]_proj.weight": "shard(0)",
    "*.self_attn.o_proj.weight": "shard(1)",
    "*.mlp.gate_proj.weight": "shard(0)",
    "*.mlp.up_proj.weight": "shard(0)",
    "*.mlp.down_proj.weight": "shard(1)",
}
"""Source: Shoeybi et al., "Megatron-LM", arXiv 1909.08053, section 3. A head of its own is cut like the embedding."""


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes; the names are those of Hugging Face's `LlamaConfig`."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ModelError(f"llama: {name}={getattr(self, name)}, expected at least 1")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ModelError(
                f"llama: hidden_size={self.hidden_size} is not divisible by num_attention_heads={self.num_attention_heads}"
            )
        if self.num_attention_heads % self.kv_heads:
            raise ModelError(
                f"llama: num_attention_heads={self.num_attention_heads} is not divisible by "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.features_per_head % 2:
            raise ModelError(f"llama: a head of {self.features_per_head} features; rotary positions need an even number")

    @property
    def features_per_head(self) -> int:
        """H."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.num_key_value_heads or self.num_attention_heads


def build_llama_model(
    vocab_size: int = 32000,
    hidden_size: int = 4096,
    intermediate_size: int = 11008,
    num_hidden_layers: int = 32,
    num_attention_heads: int = 32,
    num_key_value_heads: int | None = None,
    head_dim: int | None = None,
    rope_theta: float = 10000.0,
    rms_norm_eps: float = 1e-6,
    initializer_range: float = 0.02,
    tie_word_embeddings: bool = False,
) -> af.Model:
    """Llama as layers `embed_tokens`, `layers.0` ..., `norm`, `lm_head`.

    The batch has "input_ids", int64 (B, T); the output is logits (B, T, V).

    Args:
        vocab_size: V.
        hidden_size: D.
        intermediate_size: F, hidden features of the MLP.
        num_hidden_layers: number of blocks.
        num_attention_heads: N.
        num_key_value_heads: K; must divide N; N by default.
        head_dim: H; D / N by default.
        rope_theta: base of the wavelengths of the rotary positions.
        rms_norm_eps: added to the mean square.
        initializer_range: standard deviation of the initial weights.
        tie_word_embeddings: whether the head uses the weight of the embedding.

    Raises:
        ModelError: for sizes that do not fit together.
    """
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
        rope_theta=rope_theta,
        rms_norm_eps=rms_norm_eps,
        initializer_range=initializer_range,
        tie_word_embeddings=tie_word_embeddings,
    )
    layers = {"embed_tokens": _embedding(config)}
    for index in range(num_hidden_layers):
        layers[f"layers.{index}"] = _block(config)
    layers["norm"] = af.Layer(
        init=lambda key: {"weight": key.ones("weight", (hidden_size,))},
        apply=lambda params, x_BTD, batch: rms_norm(params, x_BTD, config),
    )
    layers["lm_head"] = _head(config)
    divisible = {
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": config.kv_heads,
        "vocab_size": vocab_size,
    }
    table = TENSOR_PARALLEL if tie_word_embeddings else {**TENSOR_PARALLEL, "lm_head.weight": "shard(0)"}
    return af.Model(
        layers,
        ties={"lm_head.weight": "embed_tokens.weight"} if tie_word_embeddings else None,
        config=config,
        tensor_parallel=af.TensorParallel(table, divisible),
    )


def rms_norm(params: Params, x_BTD: Tensor, config: LlamaConfig) -> Tensor:
    """Divide by the root of the mean square of the last dim, computed in fp32."""
    x = x_BTD.float()
    scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.rms_norm_eps)
    weight: Tensor = params["weight"]
    return weight * scaled.to(x_BTD.dtype)


def rotary(tokens: int, config: LlamaConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines for every position, fp32, shape (T, H).

    Source: Su et al., "RoFormer", arXiv 2104.09864, section 3.2.2; halves paired as in transformers.
    """
    half = torch.arange(0, config.features_per_head, 2, dtype=torch.float32, device=device) / config.features_per_head
    angle = torch.outer(torch.arange(tokens, dtype=torch.float32, device=device), config.rope_theta**-half)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x_BNTH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Turn each pair of features by its position's angle."""
    half = x_BNTH.shape[-1] // 2
    turned = torch.cat((-x_BNTH[..., half:], x_BNTH[..., :half]), dim=-1)
    return x_BNTH * cos_TH.to(x_BNTH.dtype) + turned * sin_TH.to(x_BNTH.dtype)


def attention(params: Params, x_BTD: Tensor, config: LlamaConfig) -> Tensor:
    """Causal attention; each key and value head serves N / K query heads."""
    q_BNTH, k_BKTH, v_BKTH = (
        rearrange(functional.linear(x_BTD, params[f"{part}_proj"]["weight"]), "b t (n h) -> b n t h", n=heads)
        for part, heads in (("q", config.num_attention_heads), ("k", config.kv_heads), ("v", config.kv_heads))
    )
    cos_TH, sin_TH = rotary(x_BTD.shape[1], config, x_BTD.device)
    q_BNTH, k_BKTH = rotate(q_BNTH, cos_TH, sin_TH), rotate(k_BKTH, cos_TH, sin_TH)
    group = config.num_attention_heads // config.kv_heads
    k_BNTH, v_BNTH = (repeat(x, "b k t h -> b (k g) t h", g=group) if group > 1 else x for x in (k_BKTH, v_BKTH))
    y_BNTH = functional.scaled_dot_product_attention(q_BNTH, k_BNTH, v_BNTH, is_causal=True)
    y_BTD = functional.linear(rearrange(y_BNTH, "b n t h -> b t (n h)"), params["o_proj"]["weight"])
    return af.constrain(y_BTD, "sequence")


def mlp(params: Params, x_BTD: Tensor) -> Tensor:
    """`down(silu(gate(x)) * up(x))`."""
    gate_BTF, up_BTF = (functional.linear(x_BTD, params[part]["weight"]) for part in ("gate_proj", "up_proj"))
    return af.constrain(functional.linear(functional.silu(gate_BTF) * up_BTF, params["down_proj"]["weight"]), "sequence")


def _block(config: LlamaConfig) -> af.Layer:
    width, heads = config.hidden_size, config.features_per_head * config.num_attention_heads
    kv, hidden = config.features_per_head * config.kv_heads, config.intermediate_size

    def init(key: af.random.InitKey) -> dict[str, Any]:
        def weight(name: str, rows: int, columns: int) -> dict[str, Tensor]:
            return {"weight": key.normal(f"{name}.weight", (rows, columns), std=config.initializer_range)}

        def norm(name: str) -> dict[str, Tensor]:
            return {"weight": key.ones(f"{name}.weight", (width,))}

        sizes = {"q_proj": (heads, width), "k_proj": (kv, width), "v_proj": (kv, width), "o_proj": (width, heads)}
        mlp_sizes = {"gate_proj": (hidden, width), "up_proj": (hidden, width), "down_proj": (width, hidden)}
        return {
            "input_layernorm": norm("input_layernorm"),
            "self_attn": {name: weight(f"self_attn.{name}", *size) for name, size in sizes.items()},
            "post_attention_layernorm": norm("post_attention_layernorm"),
            "mlp": {name: weight(f"mlp.{name}", *size) for name, size in mlp_sizes.items()},
        }

    def apply(params: Params, x_BTD: Tensor, batch: Params) -> Tensor:
        h_BTD = af.constrain(rms_norm(params["input_layernorm"], x_BTD, config), "replicate")
        x_BTD = x_BTD + attention(params["self_attn"], h_BTD, config)
        h_BTD = af.constrain(rms_norm(params["post_attention_layernorm"], x_BTD, config), "replicate")
        return x_BTD + mlp(params["mlp"], h_BTD)

    return af.Layer(init=init, apply=apply)


def _vocabulary(key: af.random.InitKey, config: LlamaConfig) -> dict[str, Tensor]:
    return {"weight": key.normal("weight", (config.vocab_size, config.hidden_size), std=config.initializer_range)}


def _embedding(config: LlamaConfig) -> af.Layer:
    return af.Layer(
        init=lambda key: _vocabulary(key, config),
        apply=lambda params, x, batch: af.constrain(functional.embedding(batch["input_ids"], params["weight"]), "sequence"),
    )


def _head(config: LlamaConfig) -> af.Layer:
    def apply(params: Params, x_BTD: Tensor, batch: Params) -> Tensor:
        return functional.linear(af.constrain(x_BTD, "replicate"), params["weight"])

    return af.Layer(apply) if config.tie_word_embeddings else af.Layer(apply, lambda key: _vocabulary(key, config))

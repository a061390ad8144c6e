"""Two blocks as the middle stage of three: of GPT-2 or of a Llama, the latter with an RMSNorm and a gated MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import autofunc as af
from autofunc.splitting import StageContext, follow
from autofunc.tree import flatten
from stages.gpt2 import build_gpt2_model

BLOCKS = 2


def _llama_block(features: int, heads: int) -> af.Layer:
    hidden = {"q": 1, "k": 1, "v": 1, "o": 1, "gate": 4, "up": 4}

    def init(key: Any) -> dict[str, Tensor]:
        weights = {name: key.normal(name, (features * wide, features), std=0.02) for name, wide in hidden.items()}
        weights["down"] = key.normal("down", (features, 4 * features), std=0.02)
        return {**weights, "norm_1": key.ones("norm_1", (features,)), "norm_2": key.ones("norm_2", (features,))}

    def apply(p: Mapping[str, Tensor], x: Tensor, batch: Any) -> Tensor:
        rows, tokens, _ = x.shape
        y = functional.rms_norm(x, (features,), p["norm_1"])
        q, k, v = (
            functional.linear(y, p[name]).view(rows, tokens, heads, features // heads).transpose(1, 2) for name in "qkv"
        )
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + functional.linear(y, p["o"])
        y = functional.rms_norm(x, (features,), p["norm_2"])
        y = functional.silu(functional.linear(y, p["gate"])) * functional.linear(y, p["up"])
        return x + functional.linear(y, p["down"])

    return af.Layer(init=init, apply=apply)


def middle_stage(
    family: str, features: int, tokens: int, heads: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[StageContext, dict[str, Tensor]]:
    """Return the context of the stage, and all parameters. A microbatch has one row."""
    if family == "gpt2":
        model = build_gpt2_model(vocab_size=64, n_positions=tokens, n_embd=features, n_layer=4, n_head=heads)
        points = ["h.1", "h.3"]
    else:
        embed = af.Layer(
            init=lambda key: {"weight": key.normal("weight", (64, features))},
            apply=lambda p, x, batch: functional.embedding(batch["input_ids"], p["weight"]),
        )
        head = af.Layer(apply=lambda p, x, batch: functional.linear(x, p["weight"]))
        blocks = {f"layers.{index}": _llama_block(features, heads) for index in range(BLOCKS)}
        model = af.Model({"embed": embed, **blocks, "head": head}, ties={"head.weight": "embed.weight"})
        points = ["layers.0", "head"]
    stages = af.split(model, points)
    params = flatten(model.init(device=device, dtype=dtype))
    ids = torch.randint(0, 64, (1, tokens), device=device)
    microbatch = {"input_ids": ids, "labels": ids}
    return follow(stages, params, microbatch, af.losses.causal_lm, device=torch.device(device))[0][1], params

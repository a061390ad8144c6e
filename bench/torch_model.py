"""The same GPT-2 twice: as an `af.Model`, and as modules for `torch.distributed.pipelining` that read its parameters.

Both sides run the same operators, with q, k and v as three weights, so that engines and runtimes are compared, not
models. The head has its own weight, because torch's pipelining has no tied weights.

`bench/against_torch.py` gives `TorchStage` to `af.bench`, which compares every contender's gradients with the plain loop's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import autofunc as af
from autofunc.splitting import Stage
from stages.gpt2 import GPT2Config, build_gpt2_model


def untied_gpt2(vocab: int, positions: int, features: int, blocks: int, heads: int) -> af.Model:
    """Return the GPT-2 of `stages/gpt2.py`, with a separate weight in the head."""
    tied = build_gpt2_model(vocab_size=vocab, n_positions=positions, n_embd=features, n_layer=blocks, n_head=heads)
    layers = dict(tied.layers)
    layers["head"] = af.Layer(
        init=lambda key: {"weight": key.normal("weight", (vocab, features), std=0.02)}, apply=tied.layers["head"].apply
    )
    return af.Model(layers, config=tied.config)


def cut(model: af.Model, num_stages: int) -> list[Any]:
    """Split the model into stages with equal numbers of blocks."""
    each, rest = divmod(model.config.n_layer, num_stages)
    if rest:
        raise ValueError(f"{model.config.n_layer} blocks do not divide into {num_stages} stages")
    return af.split(model, [f"h.{index * each}" for index in range(1, num_stages)])


def mean_loss_of(outputs: Tensor, microbatch: Mapping[str, Any]) -> Tensor:
    """Return the mean cross-entropy of a microbatch: a scalar has weight 1, so the step's loss is their mean."""
    return functional.cross_entropy(outputs.flatten(0, -2), microbatch["labels"].flatten())


class Block(nn.Module):
    """One block. Parameters are attributes of the block itself: submodules would only add calls."""

    def __init__(self, leaves: Mapping[str, nn.Parameter], config: GPT2Config) -> None:
        super().__init__()
        for path, leaf in leaves.items():
            self.register_parameter(path.replace(".", "_"), leaf)
        self.heads, self.shape, self.eps = config.n_head, (config.n_embd,), config.layer_norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to the same."""
        rows, tokens, features = x.shape
        heads = (rows, tokens, self.heads, features // self.heads)
        y = functional.layer_norm(x, self.shape, self.ln_1_weight, self.ln_1_bias, self.eps)
        q = functional.linear(y, self.attn_q_weight, self.attn_q_bias).view(heads).transpose(1, 2)
        k = functional.linear(y, self.attn_k_weight, self.attn_k_bias).view(heads).transpose(1, 2)
        v = functional.linear(y, self.attn_v_weight, self.attn_v_bias).view(heads).transpose(1, 2)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + functional.linear(y, self.attn_proj_weight, self.attn_proj_bias)
        y = functional.layer_norm(x, self.shape, self.ln_2_weight, self.ln_2_bias, self.eps)
        y = functional.gelu(functional.linear(y, self.mlp_fc_weight, self.mlp_fc_bias), approximate="tanh")
        return x + functional.linear(y, self.mlp_proj_weight, self.mlp_proj_bias)


class TorchStage(nn.Module):
    """The layers of one stage, for `af.bench`'s `torch_module`.

    Args:
        stage: of `untied_gpt2`.
        params: by path; this module's parameters lie in their memory.
        config: of the model.
    """

    def __init__(self, stage: Stage, params: Mapping[str, Tensor], config: GPT2Config) -> None:
        super().__init__()
        layers = stage.layers
        self.holders = {path: nn.Parameter(params[path].detach()) for path in stage.holders}
        self.is_first, self.is_last = "wte" in layers, "head" in layers
        self.shape, self.eps = (config.n_embd,), config.layer_norm_epsilon
        for path in ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias", "head.weight"):
            if path in self.holders:
                self.register_parameter(path.replace(".", "_"), self.holders[path])
        blocks = [f"{name}." for name in layers if name.startswith("h.")]
        own = [
            {path.removeprefix(name): leaf for path, leaf in self.holders.items() if path.startswith(name)}
            for name in blocks
        ]
        self.blocks = nn.ModuleList(Block(leaves, config) for leaves in own)

    def forward(self, *received: Tensor, batch_input_ids: Tensor, batch_labels: Tensor) -> Any:
        """Map features (B, T, D), or token ids (B, T) in the first stage, to features; the last returns loss and weight."""
        if self.is_first:
            x = functional.embedding(batch_input_ids, self.wte_weight) + self.wpe_weight[: batch_input_ids.shape[1]]
        else:
            (x,) = received
        for block in self.blocks:
            x = block(x)
        if not self.is_last:
            return x
        x = functional.layer_norm(x, self.shape, self.ln_f_weight, self.ln_f_bias, self.eps)
        logits = functional.linear(x, self.head_weight)
        return functional.cross_entropy(logits.flatten(0, -2), batch_labels.flatten()), torch.ones(())


def random_batch(vocab: int, rows: int, tokens: int) -> dict[str, Tensor]:
    """Return random tokens and the ones that follow them."""
    ids = torch.randint(0, vocab, (rows, tokens + 1), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}

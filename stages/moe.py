"""Mixtral: Llama's blocks with routed experts instead of the MLP, and the loss that balances them.

Source: Jiang et al., "Mixtral of Experts", arXiv 2401.04088, section 2; the balance loss from Fedus et al., "Switch
Transformers", arXiv 2101.03961, section 2.2, equations 4-6, for k experts a token. Names and numerics as in Hugging Face
transformers, `models/mixtral/modeling_mixtral.py` (`MixtralForCausalLM`), whose weights load and whose logits are equal.

Shapes: as in `stages.llama`, and E = num_local_experts, k = num_experts_per_tok, F = intermediate_size of one expert.

**Cost.** Every token goes through its k experts only, see `af.routed_experts`, and none is dropped. No shape depends on
data, so a stage can be captured. Each expert parallel rank holds its share of a block's experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn import functional

import autofunc as af
from autofunc.errors import ModelError
from autofunc.tree import flatten
from stages.huggingface import drop_tied, fill, read_settings, read_weights, require
from stages.in_transformers import moe_values
from stages.llama import (
    SIZES,
    LlamaConfig,
    attention,
    attention_init,
    embedding,
    head,
    norm_init,
    rms_norm,
    ties,
    weight_init,
)
from stages.rotary import Scaling, rope_from_hf

Params = Mapping[str, Any]


@dataclass(frozen=True)
class MoEConfig(LlamaConfig):
    """Sizes; the names are those of Hugging Face's `MixtralConfig`."""

    num_local_experts: int = 8
    num_experts_per_tok: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_experts_per_tok <= self.num_local_experts:
            raise ModelError(
                f"moe: num_experts_per_tok={self.num_experts_per_tok}, expected from 1 to "
                f"num_local_experts={self.num_local_experts}"
            )


def build_moe_model(
    vocab_size: int = 32000,
    hidden_size: int = 4096,
    intermediate_size: int = 14336,
    num_hidden_layers: int = 32,
    num_attention_heads: int = 32,
    num_key_value_heads: int | None = 8,
    head_dim: int | None = None,
    rope_theta: float = 1e6,
    rope_scaling: Scaling | None = None,
    sliding_window: int | None = None,
    attention_bias: bool = False,
    use_qk_norm: bool = False,
    rms_norm_eps: float = 1e-5,
    initializer_range: float = 0.02,
    tie_word_embeddings: bool = False,
    num_local_experts: int = 8,
    num_experts_per_tok: int = 2,
) -> af.Model:
    """Build Mixtral with layers `embed_tokens`, `layers.0` ..., `norm`, `lm_head`.

    The batch has "input_ids", int64 (B, T). Layers pass on {"hidden": (B, T, D), "balance_loss": fp32, 0-dim}; the output
    is {"logits": (B, T, V), "balance_loss": fp32, 0-dim}, see `balance_loss`.

    Args:
        vocab_size: V.
        hidden_size: D.
        intermediate_size: F, hidden features of an expert.
        num_hidden_layers: number of blocks.
        num_attention_heads: N.
        num_key_value_heads: K; must divide N; None means N.
        head_dim: H; D / N by default.
        rope_theta: base of the wavelengths of the rotary positions.
        rope_scaling: as in `build_llama_model`.
        sliding_window: number of tokens a token sees, including itself; all before it by default.
        attention_bias: whether the four projections of attention have biases.
        use_qk_norm: whether the queries and keys of each head are normalised.
        rms_norm_eps: added to the mean square.
        initializer_range: standard deviation of the initial weights.
        tie_word_embeddings: whether the head shares the embedding's weight.
        num_local_experts: E.
        num_experts_per_tok: k.

    Raises:
        ModelError: for inconsistent sizes, or an unknown scaling of the positions.
    """
    config = MoEConfig(**locals())
    embed, project = embedding(config), head(config)

    def apply_embedding(params: Params, x: Any, batch: Params) -> dict[str, Tensor]:
        hidden_BTD = embed.apply(params, x, batch)
        return {"hidden": hidden_BTD, "balance_loss": torch.zeros((), device=hidden_BTD.device)}

    def apply_norm(params: Params, x: Params, batch: Params) -> dict[str, Tensor]:
        return {**x, "hidden": rms_norm(params, x["hidden"], rms_norm_eps)}

    def apply_head(params: Params, x: Params, batch: Params) -> dict[str, Tensor]:
        return {"logits": project.apply(params, x["hidden"], batch), "balance_loss": x["balance_loss"]}

    layers = {"embed_tokens": af.Layer(embed.init, apply_embedding)}
    for index in range(num_hidden_layers):
        layers[f"layers.{index}"] = _block(config)
    layers["norm"] = af.Layer(lambda key: norm_init(key, "", hidden_size), apply_norm)
    layers["lm_head"] = af.Layer(project.init, apply_head)
    return af.Model(
        layers, ties=ties(config), config=config, experts=["layers.*.mlp.experts.*"],
        in_transformers=lambda params: (moe_values(config), to_hf(params, config)),
    )  # fmt: skip


def route(params: Params, x_ND: Tensor, config: MoEConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the experts of each token.

    Args:
        params: of the router.
        x_ND: (tokens, D).
        config: sizes.

    Returns:
        (experts, int64 (tokens, k); their weights, fp32 (tokens, k), summing to 1; this layer's balance loss, fp32, 0-dim).
    """
    probability_NE = functional.linear(x_ND, params["weight"]).float().softmax(dim=-1)
    best_NK = probability_NE.topk(config.num_experts_per_tok, dim=-1).indices
    weight_NK = probability_NE.gather(-1, best_NK)
    return best_NK, weight_NK / weight_NK.sum(dim=-1, keepdim=True), balance_loss(probability_NE, best_NK)


def balance_loss(probability_NE: Tensor, best_NK: Tensor) -> Tensor:
    """Return `E * sum over experts of (share of tokens that chose it) * (its mean probability)`; k at balance. fp32, 0-dim.

    Both factors are means over all tokens of the microbatch, including those of the other expert parallel ranks, which
    compute a block together: so any number of ranks gives the loss of one process with all their rows.

    The model's loss is the mean over its layers; each block adds its own share. Transformers (`load_balancing_loss_func`)
    takes both factors over the tokens of all layers at once, which no layer can compute alone: there an overused expert in
    one layer compensates for an underused one with the same number in another, while here every layer has to be balanced.
    With one layer both are equal, and the value at balance is always the same, so the same coefficient fits.

    Args:
        probability_NE: fp32 (tokens, E).
        best_NK: int64 (tokens, k), the experts of each token.
    """
    expert_E = torch.arange(probability_NE.shape[-1], device=best_NK.device)
    chosen_NE = (best_NK[..., None] == expert_E).any(dim=-2)
    both_2E = torch.stack((chosen_NE.float().mean(dim=0), probability_NE.mean(dim=0)))
    share_E, mean_E = af.mean_over_expert_ranks(both_2E).unbind()
    return len(expert_E) * (share_E * mean_E).sum()


def experts(params: Params, x_ND: Tensor, best_NK: Tensor, weight_NK: Tensor, count: int) -> Tensor:
    """Return the weighted sum of each token's chosen experts, `down(silu(gate(x)) * up(x))` each: (tokens, D).

    Args:
        params: of all experts, or of this expert parallel rank's.
        x_ND: (tokens, D).
        best_NK: int64 (tokens, k).
        weight_NK: (tokens, k).
        count: E.
    """

    def expert(rows_RD: Tensor, groups: af.Groups) -> Tensor:
        gate_RF, up_RF = (groups.linear(rows_RD, params[name]) for name in ("gate_proj", "up_proj"))
        return groups.linear(functional.silu(gate_RF) * up_RF, params["down_proj"])

    return af.routed_experts(x_ND, best_NK, weight_NK.to(x_ND.dtype), count, expert)


@af.losses.reduce_aux(balance_loss="mean")
def moe_causal_lm(
    outputs: Params, microbatch: Params, router_aux_loss_coef: float = 0.001
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return `af.losses.causal_lm` plus a coefficient times the balance loss.

    The mean of one microbatch is cross-entropy + coefficient * balance loss; over several, balance losses are weighted by
    the number of labels like the cross-entropies.

    Args:
        outputs: of this model.
        microbatch: has "labels", see `af.losses.causal_lm`.
        router_aux_loss_coef: the coefficient.

    Returns:
        (sum, number of labels, {"balance_loss": fp32, 0-dim}).
    """
    total, weight = af.losses.causal_lm(outputs, microbatch)
    balance = outputs["balance_loss"]
    return total + router_aux_loss_coef * balance * weight, weight, {"balance_loss": balance}


def _block(config: MoEConfig) -> af.Layer:
    width, count, hidden = config.hidden_size, config.num_local_experts, config.intermediate_size
    sizes = {"gate_proj": (count, hidden, width), "up_proj": (count, hidden, width), "down_proj": (count, width, hidden)}

    def init(key: af.random.InitKey) -> dict[str, Any]:
        stacks = key.at("mlp.experts")
        return {
            "input_layernorm": norm_init(key, "input_layernorm", width),
            "self_attn": attention_init(key, "self_attn", config),
            "post_attention_layernorm": norm_init(key, "post_attention_layernorm", width),
            "mlp": {
                "gate": weight_init(key, "mlp.gate", (count, width), config),
                "experts": {name: stacks.normal(name, size, std=config.initializer_range) for name, size in sizes.items()},
            },
        }

    def apply(params: Params, x: Params, batch: Params) -> dict[str, Tensor]:
        x_BTD = x["hidden"]
        x_BTD = x_BTD + attention(
            params["self_attn"], rms_norm(params["input_layernorm"], x_BTD, config.rms_norm_eps), config
        )
        h_BTD = rms_norm(params["post_attention_layernorm"], x_BTD, config.rms_norm_eps)
        h_ND = h_BTD.flatten(0, 1)
        best_NK, weight_NK, balance = route(params["mlp"]["gate"], h_ND, config)
        x_BTD = x_BTD + experts(params["mlp"]["experts"], h_ND, best_NK, weight_NK, count).view_as(x_BTD)
        return {"hidden": x_BTD, "balance_loss": x["balance_loss"] + balance / config.num_hidden_layers}

    return af.Layer(init=init, apply=apply)


# --- from and to Hugging Face -----------------------------------------------------------------------------------------
# A module fuses the gate and up projections of all experts in one tensor; the files on the hub store each separately.

_GATE, _UP, _BOTH = ".experts.gate_proj", ".experts.up_proj", ".experts.gate_up_proj"
_IN_FILES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def config_from_hf(config: Any) -> MoEConfig:
    """Return the config of a transformers Mixtral; its fields, `vars(...)`, are arguments of `build_moe_model`.

    Args:
        config: an `AutoConfig` result, or the mapping in a `config.json`.

    Raises:
        ModelError: for a different model, or an unsupported setting.
    """
    defaults = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5}
    settings = {**defaults, **read_settings("moe", config)}
    require("moe", settings, hidden_act="silu", attention_dropout=0.0, router_jitter_noise=0.0)
    settings["rope_theta"], settings["rope_scaling"] = rope_from_hf("moe", settings, 1e6)
    return fill("moe", MoEConfig, settings, SIZES)


def from_hf(state_dict: Mapping[str, Tensor], config: MoEConfig) -> TensorDict:
    """Return this model's parameters, copied from a `MixtralForCausalLM` state dict or its files' weights.

    Raises:
        ModelError: if a weight is missing, unexpected or of the wrong shape.
    """

    def read(path: str, leaf: Tensor) -> Tensor:
        half = config.intermediate_size
        return leaf[:, :half] if path.endswith(_GATE) else leaf[:, half:] if path.endswith(_UP) else leaf

    given = _stack({name.removeprefix("model."): leaf for name, leaf in state_dict.items()}, config)
    for alias, canonical in ties(config).items():
        drop_tied("moe", given, alias, canonical)
    spec = flatten(build_moe_model(**vars(config)).init(device="meta"))
    return read_weights("moe", given, spec, _hf_name, read)


def to_hf(params: Params, config: MoEConfig) -> dict[str, Tensor]:
    """Return the `MixtralForCausalLM` state dict of these parameters; a tied head appears under both names."""
    flat = flatten(params)
    flat.update({alias: flat[canonical] for alias, canonical in ties(config).items()})
    state: dict[str, Tensor] = {}
    for path, leaf in flat.items():
        if path.endswith(_GATE):
            leaf = torch.cat((leaf, flat[path.replace(_GATE, _UP)]), dim=1)
        if not path.endswith(_UP):
            state[path if path == "lm_head.weight" else f"model.{_hf_name(path)}"] = leaf.contiguous()
    return state


def _hf_name(path: str) -> str:
    return path.replace(_GATE, _BOTH).replace(_UP, _BOTH)


def _stack(given: dict[str, Tensor], config: MoEConfig) -> dict[str, Tensor]:
    """Convert weights from files to a module's form; a module's own are returned unchanged."""
    found = {name.replace(".block_sparse_moe.", ".mlp."): leaf for name, leaf in given.items()}
    for index in range(config.num_hidden_layers):
        stem = f"layers.{index}.mlp.experts."
        names = {
            part: [f"{stem}{e}.{short}.weight" for e in range(config.num_local_experts)]
            for part, short in _IN_FILES.items()
        }
        if all(name in found for part in names.values() for name in part):
            gate, up, down = (torch.stack([found.pop(name) for name in part]) for part in names.values())
            found[f"{stem}gate_up_proj"], found[f"{stem}down_proj"] = torch.cat((gate, up), dim=1), down
    return found

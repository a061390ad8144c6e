"""GPT-2: learned positions, pre-norm blocks, tied head, dropout.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.3; names and numerics as in
Hugging Face transformers, `models/gpt2/modeling_gpt2.py` (`GPT2LMHeadModel`), whose weights load and whose logits are
equal.

Shapes: B rows, T tokens, D = n_embd, N heads, H = D / N per head, V vocabulary. Over tp ranks heads, MLP features and
vocabulary are cut (`TENSOR_PARALLEL`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from tensordict import TensorDict
from torch import Tensor
from torch.nn import functional

import autofunc as af
from autofunc.errors import ModelError
from autofunc.model import CacheForm
from autofunc.tree import flatten
from stages.huggingface import drop_tied, fill, read_settings, read_weights, require
from stages.in_transformers import gpt2_values
from stages.key_cache import KeyCache, caching_layer
from stages.ranges import MOST_LAYERS, check_probabilities, check_scales, check_sizes

Params = Mapping[str, Any]

TIES = {"head.weight": "wte.weight"}

TENSOR_PARALLEL = {
    "wte.weight": "shard(0)",
    "*.attn.[qkv].*": "shard(0)",
    "*.attn.proj.weight": "shard(1)",
    "*.mlp.fc.*": "shard(0)",
    "*.mlp.proj.weight": "shard(1)",
}
"""Source: Shoeybi et al., "Megatron-LM", arXiv 1909.08053, section 3."""

SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")


@dataclass(frozen=True)
class GPT2Config:
    """Sizes and rates; the names are those of Hugging Face's `GPT2Config`."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    embd_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    resid_pdrop: float = 0.0
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        check_sizes("gpt2", self, (*SIZES, "n_inner"))
        check_sizes("gpt2", self, ("n_layer",), MOST_LAYERS)
        check_probabilities("gpt2", self, ("embd_pdrop", "attn_pdrop", "resid_pdrop"))
        check_scales("gpt2", self, ("layer_norm_epsilon", "initializer_range"))
        if self.n_embd % self.n_head:
            raise ModelError(f"gpt2: n_embd={self.n_embd} is not divisible by n_head={self.n_head}")

    @property
    def mlp_width(self) -> int:
        """Hidden features of the MLP: `n_inner`, or four times `n_embd`."""
        return self.n_inner or 4 * self.n_embd


def build_gpt2_model(
    vocab_size: int = 50257,
    n_positions: int = 1024,
    n_embd: int = 768,
    n_layer: int = 12,
    n_head: int = 12,
    n_inner: int | None = None,
    embd_pdrop: float = 0.0,
    attn_pdrop: float = 0.0,
    resid_pdrop: float = 0.0,
    layer_norm_epsilon: float = 1e-5,
    initializer_range: float = 0.02,
    chunked_loss: bool = False,
) -> af.Model:
    """Build GPT-2 with layers `wte`, `wpe`, `h.0` ... `h.{n_layer-1}`, `ln_f`, `head`; the head is tied to `wte.weight`.

    The batch has "input_ids", int64 (B, T) with T <= n_positions; the output is logits (B, T, V).

    Args:
        vocab_size: V.
        n_positions: longest sequence.
        n_embd: D.
        n_layer: number of blocks.
        n_head: N; must divide D.
        n_inner: hidden features of the MLP; four times D by default.
        embd_pdrop: dropout after the embeddings.
        attn_pdrop: dropout of the attention weights.
        resid_pdrop: dropout of each residual branch.
        layer_norm_epsilon: added to the variance.
        initializer_range: standard deviation of the initial weights; divided by sqrt(2 * n_layer) for those that write into
            the residual stream.
        chunked_loss: for a batch with labels, return the input of `autofunc.losses.chunked_causal_lm` instead of logits.

    Raises:
        ModelError: for inconsistent sizes; at run time, for a sequence longer than `n_positions`.
    """
    config = GPT2Config(**{name: value for name, value in locals().items() if name != "chunked_loss"})
    spread = af.TensorParallel(TENSOR_PARALLEL, divisible={"n_head": n_head, "vocab_size": vocab_size})
    model = af.Model(
        _layers(config, chunked_loss=chunked_loss), ties=TIES, config=config, tensor_parallel=spread,
        in_transformers=lambda params: (gpt2_values(config), to_hf(params, config)),
    )  # fmt: skip
    model.with_cache = lambda form: af.Model(_layers(config, form), ties=TIES, config=config)
    return model


def _layers(config: GPT2Config, form: CacheForm | None = None, *, chunked_loss: bool = False) -> dict[str, af.Layer]:
    """Return the layers by name; given a cache's form they keep keys and values, and return logits of the last token."""
    layers = {"wte": _token_embedding(config), "wpe": _position_embedding(config, form)}
    for index in range(config.n_layer):
        layers[f"h.{index}"] = _block(config, f"h.{index}", form)
    layers["ln_f"] = af.Layer(
        init=lambda key: _norm_init(key, "", config), apply=lambda params, x, batch: layer_norm(params, x, config)
    )
    layers["head"] = af.Layer(
        apply=lambda params, x_BTD, batch: af.losses.lazy_logits(
            af.constrain(x_BTD if form is None else x_BTD[:, -1:], "replicate"), params["weight"],
            batch if chunked_loss else {},
        )
    )  # fmt: skip
    return layers


def layer_norm(params: Params, x_BTD: Tensor, config: GPT2Config) -> Tensor:
    """Normalise the last dim, with weight and bias."""
    return functional.layer_norm(x_BTD, (config.n_embd,), params["weight"], params["bias"], config.layer_norm_epsilon)


def attention(
    params: Params, x_BTD: Tensor, batch: Params, config: GPT2Config, name: str, cache: KeyCache | None = None
) -> Tensor:
    """Causal multi-head attention, (B, T, D) -> (B, T, D). q, k and v are separate weights, for sharding by heads."""
    q_BNTH, k_BNTH, v_BNTH = (
        rearrange(_linear(params[part], x_BTD), "b t (n h) -> b n t h", n=config.n_head) for part in ("q", "k", "v")
    )
    if cache is not None:
        k_BNSH, v_BNSH = cache.extended(k_BNTH, v_BNTH)
        seen_B1TS = cache.seen(x_BTD.shape[1])
        y_BNTH = functional.scaled_dot_product_attention(q_BNTH, k_BNSH, v_BNSH, attn_mask=seen_B1TS)
    elif config.attn_pdrop and batch.get("key") is not None:
        y_BNTH = _attention_with_dropout(q_BNTH, k_BNTH, v_BNTH, batch, config, f"{name}.weights")
    else:
        y_BNTH = functional.scaled_dot_product_attention(q_BNTH, k_BNTH, v_BNTH, is_causal=True)
    y_BTD = af.constrain(_linear(params["proj"], rearrange(y_BNTH, "b n t h -> b t (n h)")), "sequence")
    return af.random.dropout(y_BTD, config.resid_pdrop, batch, name)


def _attention_with_dropout(q: Tensor, k: Tensor, v: Tensor, batch: Params, config: GPT2Config, name: str) -> Tensor:
    """The same attention written out, because the fused kernel draws dropout from the global generator."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    tokens = q.shape[-2]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
    weights = scores.masked_fill(~causal, torch.finfo(scores.dtype).min).softmax(dim=-1)
    return af.random.dropout(weights, config.attn_pdrop, batch, name) @ v


def mlp(params: Params, x_BTD: Tensor, batch: Params, config: GPT2Config, name: str) -> Tensor:
    """Two linear maps with a GELU (tanh approximation) in between, (B, T, D) -> (B, T, D)."""
    h_BTF = functional.gelu(_linear(params["fc"], x_BTD), approximate="tanh")
    y_BTD = af.constrain(_linear(params["proj"], h_BTF), "sequence")
    return af.random.dropout(y_BTD, config.resid_pdrop, batch, name)


def _linear(params: Params, x: Tensor) -> Tensor:
    return functional.linear(x, params["weight"], params["bias"])


def _block(config: GPT2Config, name: str, form: CacheForm | None = None) -> af.Layer:
    width, residual_std = config.n_embd, config.initializer_range / math.sqrt(2 * config.n_layer)

    def init(key: af.random.InitKey) -> dict[str, Any]:
        std = config.initializer_range
        attn = {part: _linear_init(key, f"attn.{part}", width, width, std) for part in ("q", "k", "v")}
        return {
            "ln_1": _norm_init(key, "ln_1", config),
            "attn": {**attn, "proj": _linear_init(key, "attn.proj", width, width, residual_std)},
            "ln_2": _norm_init(key, "ln_2", config),
            "mlp": {
                "fc": _linear_init(key, "mlp.fc", config.mlp_width, width, std),
                "proj": _linear_init(key, "mlp.proj", width, config.mlp_width, residual_std),
            },
        }

    def apply(params: Params, x_BTD: Tensor, batch: Params, cache: KeyCache | None = None) -> Tensor:
        h_BTD = af.constrain(layer_norm(params["ln_1"], x_BTD, config), "replicate")
        x_BTD = x_BTD + attention(params["attn"], h_BTD, batch, config, f"{name}.attn", cache)
        h_BTD = af.constrain(layer_norm(params["ln_2"], x_BTD, config), "replicate")
        return x_BTD + mlp(params["mlp"], h_BTD, batch, config, f"{name}.mlp")

    if form is None:
        return af.Layer(init=init, apply=apply)
    return caching_layer(init, apply, form, config.n_head, width // config.n_head)


def _linear_init(key: af.random.InitKey, name: str, rows: int, columns: int, std: float) -> dict[str, Tensor]:
    return {
        "weight": key.normal(f"{name}.weight", (rows, columns), std=std),
        "bias": key.zeros(f"{name}.bias", (rows,)),
    }


def _norm_init(key: af.random.InitKey, name: str, config: GPT2Config) -> dict[str, Tensor]:
    return {"weight": key.ones(f"{name}.weight", (config.n_embd,)), "bias": key.zeros(f"{name}.bias", (config.n_embd,))}


def _token_embedding(config: GPT2Config) -> af.Layer:
    return af.Layer(
        init=lambda key: {"weight": key.normal("weight", (config.vocab_size, config.n_embd), std=config.initializer_range)},
        apply=lambda params, x, batch: af.constrain(functional.embedding(batch["input_ids"], params["weight"]), "sequence"),
    )


def _position_embedding(config: GPT2Config, form: CacheForm | None) -> af.Layer:
    def apply(params: Params, x_BTD: Tensor, batch: Params) -> Tensor:
        tokens = x_BTD.shape[1]
        if form is not None:
            return x_BTD + functional.embedding(batch["position_ids"], params["weight"])
        if tokens > config.n_positions:
            raise ModelError(
                f"gpt2: a sequence of {tokens} tokens is longer than n_positions={config.n_positions}; shorten the "
                "sequences (seq_len of the dataset) or build the model with more positions"
            )
        positions_1TD = af.constrain(params["weight"][:tokens].unsqueeze(0), "sequence")
        return af.random.dropout(x_BTD + positions_1TD, config.embd_pdrop, batch, "wpe")

    return af.Layer(
        init=lambda key: {
            "weight": key.normal("weight", (config.n_positions, config.n_embd), std=config.initializer_range)
        },
        apply=apply,
    )


# --- from and to Hugging Face -----------------------------------------------------------------------------------------
# It stores linear weights as (in, out), q, k and v fused in one tensor, and all but the head under "transformer.".

_HF_NAMES = {"attn.proj": "attn.c_proj", "mlp.fc": "mlp.c_fc", "mlp.proj": "mlp.c_proj"}


def config_from_hf(config: Any) -> GPT2Config:
    """Return the config of a transformers GPT-2; its fields, `vars(...)`, are arguments of `build_gpt2_model`.

    Args:
        config: an `AutoConfig` result, or the mapping in a `config.json`.

    Raises:
        ModelError: for a different model, or an unsupported setting.
    """
    settings = read_settings("gpt2", config)
    require("gpt2", settings, activation_function="gelu_new", tie_word_embeddings=True, add_cross_attention=False)
    require("gpt2", settings, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    rates = {"embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1}  # transformers' defaults
    return fill("gpt2", GPT2Config, {**rates, **settings}, SIZES)


def from_hf(state_dict: Mapping[str, Tensor], config: GPT2Config) -> TensorDict:
    """Return this model's parameters, copied from a `GPT2LMHeadModel` state dict.

    Raises:
        ModelError: if a weight is missing, unexpected or of the wrong shape.
    """

    def read(path: str, leaf: Tensor) -> Tensor:
        part = _hf_name(path)[1]
        leaf = leaf if part is None else leaf.chunk(3, dim=-1)["qkv".index(part)]
        return leaf.t() if _is_linear_weight(path) else leaf

    given = {name.removeprefix("transformer."): leaf for name, leaf in state_dict.items()}
    given = {name: leaf for name, leaf in given.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}
    drop_tied("gpt2", given, "lm_head.weight", "wte.weight")
    spec = flatten(build_gpt2_model(**vars(config)).init(device="meta"))
    return read_weights("gpt2", given, spec, lambda path: _hf_name(path)[0], read)


def to_hf(params: Params, config: GPT2Config) -> dict[str, Tensor]:
    """Return the `GPT2LMHeadModel` state dict of these parameters; the head appears under both names."""
    flat = flatten(params)
    state: dict[str, Tensor] = {}
    for path, leaf in flat.items():
        name, part = _hf_name(path)
        if part == "q":
            stems = [path.replace(".q.", f".{each}.") for each in "qkv"]
            leaf = torch.cat([flat[stem].t() if _is_linear_weight(stem) else flat[stem] for stem in stems], dim=-1)
        elif part is not None:
            continue
        elif _is_linear_weight(path):
            leaf = leaf.t()
        state[f"transformer.{name}"] = leaf.contiguous()
    state["lm_head.weight"] = state["transformer.wte.weight"]
    return state


def _hf_name(path: str) -> tuple[str, str | None]:
    """Return (their name for our path, which third of their tensor: "q", "k", "v", or None for the whole)."""
    for part in "qkv":
        if f".attn.{part}." in path:
            return path.replace(f".attn.{part}.", ".attn.c_attn."), part
    for ours, theirs in _HF_NAMES.items():
        path = path.replace(f".{ours}.", f".{theirs}.")
    return path, None


def _is_linear_weight(path: str) -> bool:
    return path.endswith(".weight") and (".attn." in path or ".mlp." in path)

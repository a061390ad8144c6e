"""Llama, Mistral and Qwen3: rotary positions, grouped-query attention, RMS norms, gated MLP.

Source: Touvron et al., "LLaMA", arXiv 2302.13971, section 2.2; grouped queries from Ainslie et al., arXiv 2305.13245; the
sliding window from Jiang et al., "Mistral 7B", arXiv 2310.06825, section 2; normalised queries and keys from Yang et al.,
"Qwen3", arXiv 2505.09388, section 2. Names and numerics as in Hugging Face transformers, `models/llama/modeling_llama.py`,
`models/mistral/modeling_mistral.py` and `models/qwen3/modeling_qwen3.py`, whose weights load and whose logits are equal.

Shapes: B rows, T tokens, D = hidden_size, N heads, K key and value heads, H = head_dim, F = intermediate_size,
V vocabulary. Over tp ranks heads, MLP features and vocabulary are cut (`TENSOR_PARALLEL`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, repeat
from tensordict import TensorDict
from torch import Tensor
from torch.nn import functional

import autofunc as af
from autofunc.errors import ModelError
from autofunc.model import CacheForm
from autofunc.tree import flatten
from stages.huggingface import drop_tied, fill, read_settings, read_weights, require
from stages.in_transformers import llama_values
from stages.key_cache import KeyCache, caching_layer
from stages.ranges import MOST_LAYERS, check_scales, check_sizes
from stages.rotary import Scaling, check_scaling, rope_from_hf, rotary, rotate

Params = Mapping[str, Any]

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

TENSOR_PARALLEL = {
    "embed_tokens.weight": "shard(0)",
    "*.self_attn.[qkv]_proj.*": "shard(0)",
    "*.self_attn.o_proj.weight": "shard(1)",
    "*.mlp.gate_proj.weight": "shard(0)",
    "*.mlp.up_proj.weight": "shard(0)",
    "*.mlp.down_proj.weight": "shard(1)",
}
"""Source: Shoeybi et al., "Megatron-LM", arXiv 1909.08053, section 3. An untied head is sharded like the embedding."""


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes; the names are those of Hugging Face's configurations. `use_qk_norm` is always on in Qwen3."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float = 10000.0
    rope_scaling: Scaling | None = None
    sliding_window: int | None = None
    attention_bias: bool = False
    use_qk_norm: bool = False
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        module = type(self).__name__.removesuffix("Config").lower()
        check_sizes(module, self, (*SIZES, "head_dim", "num_key_value_heads"))
        check_sizes(module, self, ("num_hidden_layers",), MOST_LAYERS)
        check_scales(module, self, ("rms_norm_eps", "initializer_range"))
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ModelError(
                f"{module}: hidden_size={self.hidden_size} is not divisible by "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.num_attention_heads % self.kv_heads:
            raise ModelError(
                f"{module}: num_attention_heads={self.num_attention_heads} is not divisible by "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.features_per_head % 2:
            raise ModelError(f"{module}: a head of {self.features_per_head} features; rotary positions need an even number")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ModelError(f"{module}: sliding_window={self.sliding_window}, expected at least 1, or None for no window")
        check_scaling(module, self.rope_scaling)

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
    rope_scaling: Scaling | None = None,
    sliding_window: int | None = None,
    attention_bias: bool = False,
    use_qk_norm: bool = False,
    rms_norm_eps: float = 1e-6,
    initializer_range: float = 0.02,
    tie_word_embeddings: bool = False,
    chunked_loss: bool = False,
) -> af.Model:
    """Build Llama with layers `embed_tokens`, `layers.0` ..., `norm`, `lm_head`.

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
        rope_scaling: `{"rope_type": "llama3", ...}` or `{"rope_type": "linear", "factor": 2.0}`, for longer contexts.
        sliding_window: number of tokens a token sees, including itself; all before it by default. A window shorter than the
            sequence needs a mask, with which torch 2.13 cannot spread attention over tp ranks on CPU.
        attention_bias: whether the four projections of attention have biases.
        use_qk_norm: whether the queries and keys of each head are normalised, as in Qwen3.
        rms_norm_eps: added to the mean square.
        initializer_range: standard deviation of the initial weights.
        tie_word_embeddings: whether the head shares the embedding's weight.
        chunked_loss: for a batch with labels, return the input of `autofunc.losses.chunked_causal_lm` instead of logits.

    Raises:
        ModelError: for inconsistent sizes, or an unknown scaling of the positions.
    """
    config = LlamaConfig(**{name: value for name, value in locals().items() if name != "chunked_loss"})
    divisible = {
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": config.kv_heads,
        "vocab_size": vocab_size,
    }
    table = TENSOR_PARALLEL if tie_word_embeddings else {**TENSOR_PARALLEL, "lm_head.weight": "shard(0)"}
    model = af.Model(
        _layers(config, chunked_loss=chunked_loss), ties=ties(config), config=config,
        tensor_parallel=af.TensorParallel(table, divisible),
        in_transformers=lambda params: (llama_values(config), to_hf(params, config)),
    )  # fmt: skip
    model.with_cache = lambda form: af.Model(_layers(config, form), ties=ties(config), config=config)
    return model


def _layers(config: LlamaConfig, form: CacheForm | None = None, *, chunked_loss: bool = False) -> dict[str, af.Layer]:
    """Return the layers by name; given a cache's form they keep keys and values, and return logits of the last token."""
    layers = {"embed_tokens": embedding(config)}
    for index in range(config.num_hidden_layers):
        layers[f"layers.{index}"] = _block(config, form)
    layers["norm"] = af.Layer(
        init=lambda key: norm_init(key, "", config.hidden_size),
        apply=lambda params, x_BTD, batch: rms_norm(params, x_BTD if form is None else x_BTD[:, -1:], config.rms_norm_eps),
    )
    layers["lm_head"] = head(config, chunked_loss=chunked_loss)
    return layers


def ties(config: LlamaConfig) -> dict[str, str]:
    """Return the tie of the head to the embedding, if configured."""
    return {"lm_head.weight": "embed_tokens.weight"} if config.tie_word_embeddings else {}


def rms_norm(params: Params, x: Tensor, eps: float) -> Tensor:
    """Divide by the root of the mean square of the last dim, computed in fp32."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    weight: Tensor = params["weight"]
    return weight * scaled.to(x.dtype)


def norm_init(key: af.random.InitKey, name: str, width: int) -> dict[str, Tensor]:
    """Return the weight of `rms_norm`, (width,)."""
    return {"weight": key.at(name).ones("weight", (width,))}


def attention(params: Params, x_BTD: Tensor, config: LlamaConfig, cache: KeyCache | None = None) -> Tensor:
    """Causal attention, (B, T, D) -> (B, T, D); each key and value head serves N / K query heads."""
    q_BTNH, k_BTKH, v_BTKH = (
        rearrange(_linear(params[f"{part}_proj"], x_BTD), "b t (n h) -> b t n h", n=heads)
        for part, heads in (("q", config.num_attention_heads), ("k", config.kv_heads), ("v", config.kv_heads))
    )
    if config.use_qk_norm:
        q_BTNH = rms_norm(params["q_norm"], q_BTNH, config.rms_norm_eps)
        k_BTKH = rms_norm(params["k_norm"], k_BTKH, config.rms_norm_eps)
    q_BNTH, k_BKTH, v_BKTH = (rearrange(x, "b t n h -> b n t h") for x in (q_BTNH, k_BTKH, v_BTKH))
    tokens = x_BTD.shape[1]
    places = torch.arange(tokens, device=x_BTD.device) if cache is None else cache.places_B1T
    cos_TH, sin_TH = rotary(places, config.features_per_head, config.rope_theta, config.rope_scaling)
    q_BNTH, k_BKTH = rotate(q_BNTH, cos_TH, sin_TH), rotate(k_BKTH, cos_TH, sin_TH)
    seen = None  # without a mask, attention can use its fastest kernels
    if cache is not None:
        k_BKTH, v_BKTH = cache.extended(k_BKTH, v_BKTH)
        seen = cache.seen(tokens)
    group = config.num_attention_heads // config.kv_heads
    k_BNTH, v_BNTH = (repeat(x, "b k t h -> b (k g) t h", g=group) if group > 1 else x for x in (k_BKTH, v_BKTH))
    if cache is None and config.sliding_window is not None and config.sliding_window < tokens:
        position = torch.arange(tokens, device=x_BTD.device)
        distance_TT = position[:, None] - position
        seen = (distance_TT >= 0) & (distance_TT < config.sliding_window)
    y_BNTH = functional.scaled_dot_product_attention(q_BNTH, k_BNTH, v_BNTH, attn_mask=seen, is_causal=seen is None)
    return af.constrain(_linear(params["o_proj"], rearrange(y_BNTH, "b n t h -> b t (n h)")), "sequence")


def attention_init(key: af.random.InitKey, name: str, config: LlamaConfig) -> dict[str, dict[str, Tensor]]:
    """Return the parameters of `attention`."""
    key, width, per_head = key.at(name), config.hidden_size, config.features_per_head
    heads, kv = per_head * config.num_attention_heads, per_head * config.kv_heads
    sizes = {"q_proj": (heads, width), "k_proj": (kv, width), "v_proj": (kv, width), "o_proj": (width, heads)}
    made = {part: weight_init(key, part, size, config) for part, size in sizes.items()}
    if config.attention_bias:
        made = {part: {**each, "bias": key.zeros(f"{part}.bias", sizes[part][:1])} for part, each in made.items()}
    norms = ("q_norm", "k_norm") if config.use_qk_norm else ()
    return {**made, **{part: norm_init(key, part, per_head) for part in norms}}


def weight_init(key: af.random.InitKey, name: str, size: tuple[int, ...], config: LlamaConfig) -> dict[str, Tensor]:
    """Return a linear map's weight, (out, in)."""
    return {"weight": key.at(name).normal("weight", size, std=config.initializer_range)}


def mlp(params: Params, x_BTD: Tensor) -> Tensor:
    """Compute `down(silu(gate(x)) * up(x))`, (B, T, D) -> (B, T, D)."""
    gate_BTF, up_BTF = (functional.linear(x_BTD, params[part]["weight"]) for part in ("gate_proj", "up_proj"))
    return af.constrain(functional.linear(functional.silu(gate_BTF) * up_BTF, params["down_proj"]["weight"]), "sequence")


def _linear(params: Params, x: Tensor) -> Tensor:
    return functional.linear(x, params["weight"], params.get("bias"))


def _block(config: LlamaConfig, form: CacheForm | None = None) -> af.Layer:
    width, hidden = config.hidden_size, config.intermediate_size
    mlp_sizes = {"gate_proj": (hidden, width), "up_proj": (hidden, width), "down_proj": (width, hidden)}

    def init(key: af.random.InitKey) -> dict[str, Any]:
        return {
            "input_layernorm": norm_init(key, "input_layernorm", width),
            "self_attn": attention_init(key, "self_attn", config),
            "post_attention_layernorm": norm_init(key, "post_attention_layernorm", width),
            "mlp": {name: weight_init(key, f"mlp.{name}", size, config) for name, size in mlp_sizes.items()},
        }

    def apply(params: Params, x_BTD: Tensor, batch: Params, cache: KeyCache | None = None) -> Tensor:
        h_BTD = af.constrain(rms_norm(params["input_layernorm"], x_BTD, config.rms_norm_eps), "replicate")
        x_BTD = x_BTD + attention(params["self_attn"], h_BTD, config, cache)
        h_BTD = af.constrain(rms_norm(params["post_attention_layernorm"], x_BTD, config.rms_norm_eps), "replicate")
        return x_BTD + mlp(params["mlp"], h_BTD)

    if form is None:
        return af.Layer(init=init, apply=apply)
    return caching_layer(init, apply, form, config.kv_heads, config.features_per_head, config.sliding_window)


def embedding(config: LlamaConfig) -> af.Layer:
    """Build the layer from batch["input_ids"] (B, T) to (B, T, D)."""
    return af.Layer(
        init=lambda key: weight_init(key, "", (config.vocab_size, config.hidden_size), config),
        apply=lambda params, x, batch: af.constrain(functional.embedding(batch["input_ids"], params["weight"]), "sequence"),
    )


def head(config: LlamaConfig, *, chunked_loss: bool = False) -> af.Layer:
    """Build the layer from (B, T, D) to logits (B, T, V), or to a chunked loss's input; if tied it has no parameters."""

    def apply(params: Params, x_BTD: Tensor, batch: Params) -> Any:
        x_BTD = af.constrain(x_BTD, "replicate")
        return af.losses.lazy_logits(x_BTD, params["weight"], batch if chunked_loss else {})

    return af.Layer(apply=apply) if config.tie_word_embeddings else af.Layer(embedding(config).init, apply)


# --- from and to Hugging Face -----------------------------------------------------------------------------------------
# Paths are theirs without "model."; their state dict also contains a tied head.

_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "use_qk_norm": True},
}


def config_from_hf(config: Any) -> LlamaConfig:
    """Return the config of a transformers Llama, Mistral or Qwen3; its fields are arguments of `build_llama_model`.

    Args:
        config: an `AutoConfig` result, or the mapping in a `config.json`.

    Raises:
        ModelError: for a different model, or an unsupported setting.
    """
    settings = read_settings("llama", config)
    settings = {**_DEFAULTS[settings["model_type"]], **settings}
    require("llama", settings, hidden_act="silu", mlp_bias=False, attention_dropout=0.0)
    if settings["model_type"] == "qwen3":
        settings["sliding_window"] = _window_of_all_layers(settings)
    settings["rope_theta"], settings["rope_scaling"] = rope_from_hf("llama", settings, 10000.0)
    return fill("llama", LlamaConfig, settings, SIZES)


def _window_of_all_layers(settings: Params) -> int | None:
    """Return the sliding window shared by all layers, or None; Qwen3 may have one in its last layers only."""
    window = settings.get("sliding_window") if settings.get("use_sliding_window") else None
    full = min(settings.get("max_window_layers", 28), settings["num_hidden_layers"])
    default = ["full_attention"] * full + ["sliding_attention"] * (settings["num_hidden_layers"] - full)
    kinds = set(settings.get("layer_types") or default) if window else {"full_attention"}
    if len(kinds) > 1:
        raise ModelError("llama: a sliding window in some layers only is not supported; expected all or none")
    return window if kinds == {"sliding_attention"} else None


def from_hf(state_dict: Mapping[str, Tensor], config: LlamaConfig) -> TensorDict:
    """Return this model's parameters, copied from the state dict of a `...ForCausalLM`.

    Raises:
        ModelError: if a weight is missing, unexpected or of the wrong shape.
    """
    given = {name.removeprefix("model."): leaf for name, leaf in state_dict.items()}
    given = {name: leaf for name, leaf in given.items() if not name.endswith(".rotary_emb.inv_freq")}  # in old files
    for alias, canonical in ties(config).items():
        drop_tied("llama", given, alias, canonical)
    return read_weights("llama", given, flatten(build_llama_model(**vars(config)).init(device="meta")))


def to_hf(params: Params, config: LlamaConfig) -> dict[str, Tensor]:
    """Return the `...ForCausalLM` state dict of these parameters; a tied head appears under both names."""
    flat = flatten(params)
    flat.update({alias: flat[canonical] for alias, canonical in ties(config).items()})
    return {path if path == "lm_head.weight" else f"model.{path}": leaf.contiguous() for path, leaf in flat.items()}

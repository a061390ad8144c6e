"""T5: an encoder and a decoder with relative positions, one shared embedding, dropout.

Source: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", arXiv
1910.10683, section 2.1; the gated MLP of T5 v1.1 from Shazeer, arXiv 2002.05202, section 2. Names and numerics as in
Hugging Face transformers, `models/t5/modeling_t5.py` (`T5ForConditionalGeneration`), whose weights load and whose logits
are equal.

**What crosses.** Encoder blocks pass on a tensor. Decoder blocks pass on {"hidden", "encoder_hidden"}: the encoder's output
goes through all of them, and the last one drops it. Position biases are not sent: the small table, buckets times heads, is
tied to that of the first block of its stack, and every block computes its own bias, which is far larger.

Shapes: B rows, S tokens of the encoder, T of the decoder, Q of queries and K of keys (S or T), D = d_model, N heads,
H = d_kv, F = d_ff, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from tensordict import TensorDict
from torch import Tensor
from torch.nn import functional

import autofunc as af
from autofunc.errors import ModelError, one_of
from autofunc.tree import flatten
from stages.huggingface import drop_tied, fill, read_settings, read_weights, require
from stages.in_transformers import t5_values
from stages.llama import norm_init, rms_norm
from stages.ranges import MOST_LAYERS, check_probabilities, check_scales, check_sizes
from stages.relative_positions import position_bias

Params = Mapping[str, Any]

SIZES = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
FEED_FORWARD = {"relu": ("wi",), "gated-gelu": ("wi_0", "wi_1")}
"""`feed_forward_proj` -> the input projections of the MLP: T5 v1.0 and v1.1."""


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """Sizes and rates; the names are those of Hugging Face's `T5Config`."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.0
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        check_sizes("encoder_decoder", self, SIZES)
        check_sizes("encoder_decoder", self, ("num_layers", "decoder_layers"), MOST_LAYERS)
        check_probabilities("encoder_decoder", self, ("dropout_rate",))
        check_scales("encoder_decoder", self, ("layer_norm_epsilon", "initializer_factor"))
        if self.relative_attention_num_buckets < 4 or self.relative_attention_num_buckets % 2:
            raise ModelError(
                f"encoder_decoder: relative_attention_num_buckets={self.relative_attention_num_buckets}, "
                "expected an even number of at least 4"
            )
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 2:
            raise ModelError(
                f"encoder_decoder: relative_attention_max_distance={self.relative_attention_max_distance}, expected more "
                f"than half of relative_attention_num_buckets={self.relative_attention_num_buckets}"
            )
        if self.feed_forward_proj not in FEED_FORWARD:
            raise ModelError(
                f"encoder_decoder: feed_forward_proj={self.feed_forward_proj!r} is not supported; "
                + one_of(self.feed_forward_proj, FEED_FORWARD)
            )

    @property
    def decoder_layers(self) -> int:
        """Number of decoder blocks: `num_decoder_layers`, or as many as in the encoder."""
        return self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers


def build_encoder_decoder_model(
    vocab_size: int = 32128,
    d_model: int = 512,
    d_kv: int = 64,
    d_ff: int = 2048,
    num_layers: int = 6,
    num_decoder_layers: int | None = None,
    num_heads: int = 8,
    relative_attention_num_buckets: int = 32,
    relative_attention_max_distance: int = 128,
    dropout_rate: float = 0.0,
    layer_norm_epsilon: float = 1e-6,
    initializer_factor: float = 1.0,
    feed_forward_proj: str = "relu",
    tie_word_embeddings: bool = True,
) -> af.Model:
    """Build T5 with layers `shared`, `encoder.block.0` ..., `encoder.final_layer_norm`, `decoder.embed_tokens`,
    `decoder.block.0` ..., `decoder.final_layer_norm`, `lm_head`.

    The batch has "input_ids", int64 (B, S); "decoder_input_ids", int64 (B, T), which begin with the start token; and
    optionally "attention_mask" (B, S), zero where the encoder's input is padding. The output is logits (B, T, V).

    Args:
        vocab_size: V.
        d_model: D.
        d_kv: H.
        d_ff: F.
        num_layers: number of encoder blocks.
        num_decoder_layers: number of decoder blocks; `num_layers` by default.
        num_heads: N.
        relative_attention_num_buckets: number of distance buckets; the encoder uses half of them per direction.
        relative_attention_max_distance: beyond it all distances share a bucket.
        dropout_rate: of embeddings, attention weights, inside the MLP, each branch, and the end of both stacks.
        layer_norm_epsilon: added to the mean square.
        initializer_factor: scales the initial weights.
        feed_forward_proj: "relu" (T5 v1.0) or "gated-gelu" (v1.1).
        tie_word_embeddings: whether the head uses the shared embedding, on features scaled by D**-0.5 (v1.0), or has its
            own weight (v1.1).

    Raises:
        ModelError: for inconsistent sizes, or an unknown MLP.
    """
    config = EncoderDecoderConfig(**locals())
    layers = {"shared": _shared(config)}
    for index in range(num_layers):
        layers[f"encoder.block.{index}"] = _block(config, "encoder", index)
    layers["encoder.final_layer_norm"] = _final_norm(config, "encoder.final_layer_norm")
    layers["decoder.embed_tokens"] = _decoder_embedding(config)
    for index in range(config.decoder_layers):
        layers[f"decoder.block.{index}"] = _block(config, "decoder", index)
    layers["decoder.final_layer_norm"] = _final_norm(config, "decoder.final_layer_norm")
    layers["lm_head"] = _head(config)
    return af.Model(
        layers, ties={**_ties_in_state(config), **_ties_of_positions(config)}, config=config,
        in_transformers=lambda params: (t5_values(config), to_hf(params, config)),
    )  # fmt: skip


def attention(
    params: Params, x_BQD: Tensor, y_BKD: Tensor, biases: Iterable[Tensor], batch: Params, config: Any, name: str
) -> Tensor:
    """Attend from x to y with unscaled scores; returns (B, Q, D). Written out: no fused kernel differentiates a bias.

    Args:
        params: the weights of `q`, `k`, `v` and `o`.
        x_BQD: source of the queries.
        y_BKD: source of the keys and values.
        biases: added to the scores; each (B or 1, N or 1, Q or 1, K).
        batch: for dropout.
        config: of the model.
        name: for dropout.
    """
    q_BNQH, k_BNKH, v_BNKH = (
        rearrange(functional.linear(each, params[part]["weight"]), "b t (n h) -> b n t h", n=config.num_heads)
        for part, each in (("q", x_BQD), ("k", y_BKD), ("v", y_BKD))
    )
    scores_BNQK = q_BNQH @ k_BNKH.transpose(-2, -1)
    for bias in biases:
        scores_BNQK = scores_BNQK + bias
    weights_BNQK = af.random.dropout(scores_BNQK.softmax(dim=-1), config.dropout_rate, batch, f"{name}.weights")
    y_BQD = functional.linear(rearrange(weights_BNQK @ v_BNKH, "b n q h -> b q (n h)"), params["o"]["weight"])
    return af.random.dropout(y_BQD, config.dropout_rate, batch, name)


def padding_bias(batch: Params, dtype: torch.dtype) -> list[Tensor]:
    """Return a bias (B, 1, 1, S) that hides padding, where batch["attention_mask"] is zero; no bias without a mask."""
    mask = batch.get("attention_mask")
    if mask is None:
        return []
    padding_B11S = rearrange(mask == 0, "b s -> b 1 1 s")
    return [
        torch.zeros(padding_B11S.shape, dtype=dtype, device=mask.device).masked_fill(padding_B11S, torch.finfo(dtype).min)
    ]


def mlp(params: Params, x_BTD: Tensor, batch: Params, config: EncoderDecoderConfig, name: str) -> Tensor:
    """Compute `wo(relu(wi(x)))`, or `wo(gelu(wi_0(x)) * wi_1(x))` with the tanh approximation."""
    first, *rest = (functional.linear(x_BTD, params[part]["weight"]) for part in FEED_FORWARD[config.feed_forward_proj])
    h_BTF = functional.gelu(first, approximate="tanh") * rest[0] if rest else functional.relu(first)
    h_BTF = af.random.dropout(h_BTF, config.dropout_rate, batch, f"{name}.hidden")
    return af.random.dropout(functional.linear(h_BTF, params["wo"]["weight"]), config.dropout_rate, batch, name)


def _block(config: EncoderDecoderConfig, stack: str, index: int) -> af.Layer:
    """Build a block: self-attention, cross-attention in the decoder, and the MLP, each pre-normed and residual."""
    decoder = stack == "decoder"
    parts = ("SelfAttention", "EncDecAttention", "DenseReluDense") if decoder else ("SelfAttention", "DenseReluDense")

    def part_init(key: af.random.InitKey, part: str) -> dict[str, Any]:
        if part == "DenseReluDense":
            return _mlp_init(key, config)
        return _attention_init(key, config, positions=part == "SelfAttention" and index == 0)

    def init(key: af.random.InitKey) -> dict[str, Any]:
        made = {
            str(number): {
                part: part_init(key.at(f"layer.{number}.{part}"), part),
                "layer_norm": norm_init(key, "", config.d_model),
            }
            for number, part in enumerate(parts)
        }
        return {"layer": made}

    def apply(params: Params, x: Any, batch: Params) -> Any:
        x_BTD = x["hidden"] if decoder else x
        for number, part in enumerate(parts):
            both, name = params["layer"][str(number)], f"{stack}.block.{index}.{part}"
            own, h_BTD = both[part], rms_norm(both["layer_norm"], x_BTD, config.layer_norm_epsilon)
            padding = [] if decoder and part == "SelfAttention" else padding_bias(batch, x_BTD.dtype)
            if part == "DenseReluDense":
                x_BTD = x_BTD + mlp(own, h_BTD, batch, config, name)
            elif part == "EncDecAttention":
                x_BTD = x_BTD + attention(own, h_BTD, x["encoder_hidden"], padding, batch, config, name)
            else:
                table, longest = own["relative_attention_bias"]["weight"], config.relative_attention_max_distance
                bias = position_bias(table, x_BTD.shape[1], longest, causal=decoder)
                x_BTD = x_BTD + attention(own, h_BTD, h_BTD, [bias, *padding], batch, config, name)
        if decoder and index < config.decoder_layers - 1:
            return {"hidden": x_BTD, "encoder_hidden": x["encoder_hidden"]}
        return x_BTD

    return af.Layer(init=init, apply=apply)


def _weight(key: af.random.InitKey, name: str, size: tuple[int, int], std: float) -> dict[str, Tensor]:
    return {"weight": key.at(name).normal("weight", size, std=std)}


def _attention_init(key: af.random.InitKey, config: EncoderDecoderConfig, positions: bool) -> dict[str, Any]:
    """Initialise attention; queries start smaller because scores are not scaled."""
    width, heads, factor = config.d_model, config.num_heads * config.d_kv, config.initializer_factor
    made = {part: _weight(key, part, (heads, width), factor * width**-0.5) for part in "kv"}
    made["q"] = _weight(key, "q", (heads, width), factor * (width * config.d_kv) ** -0.5)
    made["o"] = _weight(key, "o", (width, heads), factor * heads**-0.5)
    if positions:
        size = (config.relative_attention_num_buckets, config.num_heads)
        made["relative_attention_bias"] = _weight(key, "relative_attention_bias", size, factor * width**-0.5)
    return made


def _mlp_init(key: af.random.InitKey, config: EncoderDecoderConfig) -> dict[str, Any]:
    width, hidden, factor = config.d_model, config.d_ff, config.initializer_factor
    into = {
        part: _weight(key, part, (hidden, width), factor * width**-0.5) for part in FEED_FORWARD[config.feed_forward_proj]
    }
    return {**into, "wo": _weight(key, "wo", (width, hidden), factor * hidden**-0.5)}


def _shared(config: EncoderDecoderConfig) -> af.Layer:
    def apply(params: Params, x: Any, batch: Params) -> Tensor:
        return af.random.dropout(
            functional.embedding(batch["input_ids"], params["weight"]), config.dropout_rate, batch, "shared"
        )

    return af.Layer(lambda key: _weight(key, "", (config.vocab_size, config.d_model), config.initializer_factor), apply)


def _decoder_embedding(config: EncoderDecoderConfig) -> af.Layer:
    def apply(params: Params, x_BSD: Tensor, batch: Params) -> dict[str, Tensor]:
        x_BTD = functional.embedding(batch["decoder_input_ids"], params["weight"])
        x_BTD = af.random.dropout(x_BTD, config.dropout_rate, batch, "decoder.embed_tokens")
        return {"hidden": x_BTD, "encoder_hidden": x_BSD}

    return af.Layer(apply=apply)


def _final_norm(config: EncoderDecoderConfig, name: str) -> af.Layer:
    def apply(params: Params, x_BTD: Tensor, batch: Params) -> Tensor:
        return af.random.dropout(rms_norm(params, x_BTD, config.layer_norm_epsilon), config.dropout_rate, batch, name)

    return af.Layer(lambda key: norm_init(key, "", config.d_model), apply)


def _head(config: EncoderDecoderConfig) -> af.Layer:
    if not config.tie_word_embeddings:
        return af.Layer(_shared(config).init, lambda params, x_BTD, batch: functional.linear(x_BTD, params["weight"]))
    return af.Layer(apply=lambda params, x_BTD, batch: functional.linear(x_BTD * config.d_model**-0.5, params["weight"]))


def _ties_in_state(config: EncoderDecoderConfig) -> dict[str, str]:
    """Return the ties that a state dict also contains."""
    aliases = ["decoder.embed_tokens.weight", *(["lm_head.weight"] if config.tie_word_embeddings else [])]
    return dict.fromkeys(aliases, "shared.weight")


def _ties_of_positions(config: EncoderDecoderConfig) -> dict[str, str]:
    """Return the ties of every later block's position table to that of the first block in its stack."""
    table = "{}.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    counts = {"encoder": config.num_layers, "decoder": config.decoder_layers}
    return {table.format(stack, n): table.format(stack, 0) for stack, count in counts.items() for n in range(1, count)}


# --- from and to Hugging Face -----------------------------------------------------------------------------------------
# Paths are theirs; they also store the shared embedding under each stack's name.


def config_from_hf(config: Any) -> EncoderDecoderConfig:
    """Return the config of a transformers T5; its fields, `vars(...)`, are arguments of `build_encoder_decoder_model`.

    Transformers 5 marks every T5 as tied, and keeps the file's own value as `scale_decoder_outputs`: a head whose features
    are not scaled gets its own weight, as in T5 v1.1.

    Args:
        config: an `AutoConfig` result, or the mapping in a `config.json`.

    Raises:
        ModelError: for a different model, or an unsupported setting.
    """
    settings = {"dropout_rate": 0.1, **read_settings("encoder_decoder", config)}
    require("encoder_decoder", settings, is_encoder_decoder=True)
    scaled = settings.get("scale_decoder_outputs")
    settings["tie_word_embeddings"] = settings.get("tie_word_embeddings") is not False if scaled is None else scaled
    return fill(
        "encoder_decoder",
        EncoderDecoderConfig,
        settings,
        SIZES,
    )


def from_hf(state_dict: Mapping[str, Tensor], config: EncoderDecoderConfig) -> TensorDict:
    """Return this model's parameters, copied from a `T5ForConditionalGeneration` state dict.

    Raises:
        ModelError: if a weight is missing, unexpected or of the wrong shape.
    """
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"  # in old files, and unused
    given = {name: leaf for name, leaf in state_dict.items() if name != unused}
    for alias, canonical in {"encoder.embed_tokens.weight": "shared.weight", **_ties_in_state(config)}.items():
        drop_tied("encoder_decoder", given, alias, canonical)
    return read_weights("encoder_decoder", given, flatten(build_encoder_decoder_model(**vars(config)).init(device="meta")))


def to_hf(params: Params, config: EncoderDecoderConfig) -> dict[str, Tensor]:
    """Return the `T5ForConditionalGeneration` state dict of these parameters; a shared weight appears under every name."""
    flat = flatten(params)
    flat.update({alias: flat[canonical] for alias, canonical in _ties_in_state(config).items()})
    return {**flat, "encoder.embed_tokens.weight": flat["shared.weight"]}

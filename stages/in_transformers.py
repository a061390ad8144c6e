"""Each model's form in transformers: the values of its config.json, for `autofunc export`.

Each function is the inverse of its module's `config_from_hf`. Token ids are None unless the architecture fixes them.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from autofunc.errors import ModelError


def gpt2_values(config: Any) -> dict[str, Any]:
    """Return the values for a `stages.gpt2.GPT2Config`."""
    fixed = {"activation_function": "gelu_new", "bos_token_id": None, "eos_token_id": None}
    return {**_named("gpt2", "GPT2LMHeadModel"), **asdict(config), **fixed}


def llama_values(config: Any) -> dict[str, Any]:
    """Return the values for a `stages.llama.LlamaConfig`: a Llama, Mistral or Qwen3, depending on its features.

    Raises:
        ModelError: for a combination of features that none of them has.
    """
    if config.use_qk_norm:
        window = config.sliding_window
        kind = "full_attention" if window is None else "sliding_attention"
        windows = {"use_sliding_window": window is not None, "layer_types": [kind] * config.num_hidden_layers}
        return {**_named("qwen3", "Qwen3ForCausalLM"), **_llama_sizes(config), "sliding_window": window, **windows}
    if config.sliding_window is None:
        return {**_named("llama", "LlamaForCausalLM"), **_llama_sizes(config)}
    if config.attention_bias:
        raise ModelError("llama: no transformers model has attention_bias and sliding_window without use_qk_norm")
    return {**_named("mistral", "MistralForCausalLM"), **_llama_sizes(config), "sliding_window": config.sliding_window}


def moe_values(config: Any) -> dict[str, Any]:
    """Return the values for a `stages.moe.MoEConfig`.

    Raises:
        ModelError: for features that a Mixtral does not have.
    """
    for name in ("use_qk_norm", "attention_bias"):
        if getattr(config, name):
            raise ModelError(f"moe: the Mixtral of transformers has no {name}, so this model has no form there")
    experts = {name: getattr(config, name) for name in ("num_local_experts", "num_experts_per_tok", "sliding_window")}
    return {**_named("mixtral", "MixtralForCausalLM"), **_llama_sizes(config), **experts}


def t5_values(config: Any) -> dict[str, Any]:
    """Return the values for a `stages.encoder_decoder.EncoderDecoderConfig`; padding and end-of-text ids are every T5's."""
    fixed = {
        "num_decoder_layers": config.decoder_layers, "scale_decoder_outputs": config.tie_word_embeddings,
        "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    return {**_named("t5", "T5ForConditionalGeneration"), **asdict(config), **fixed}


def _named(model_type: str, architecture: str) -> dict[str, Any]:
    return {"model_type": model_type, "architectures": [architecture]}


def _llama_sizes(config: Any) -> dict[str, Any]:
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "attention_bias",
        "rms_norm_eps", "initializer_range", "tie_word_embeddings",
    )  # fmt: skip
    return {
        **{name: getattr(config, name) for name in names},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.features_per_head,
        "rope_parameters": {"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_theta},
        "bos_token_id": None,
        "eos_token_id": None,
    }

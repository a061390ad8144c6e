"""Do models of transformers with adapters of PEFT, unmodified, give the same loss and gradients when pipelined?

Tiny random Llama and T5 in train mode, without dropout in both runs; the parameters that PEFT leaves trainable are trained.
A table in Markdown goes to stdout.

Run: python bench/zoo_peft.py [names ...] [--check]
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from tried import LAYOUTS, Case, table, try_all

INSTALL = "pip install peft accelerate, then run this again"
ROWS, WORDS, TOKENS = 4, 128, 12
POINTS = (["layers.1", "layers.3"], "zb_h1")
"""Split points, by the ends of long names: `base_model.model.model.layers.1`."""

Adapter = tuple[str, dict[str, Any]]
"""A config of PEFT, and its options."""

LLAMA: dict[str, Adapter] = {
    "LoRA": ("LoraConfig", {"r": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}),
    "LoRA, rsLoRA on all linears, with biases": (
        "LoraConfig",
        {"r": 4, "use_rslora": True, "target_modules": "all-linear", "lora_bias": True, "bias": "lora_only"},
    ),
    "LoRA, head and embeddings saved": (
        "LoraConfig",
        {"r": 4, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "LoRA on embeddings": ("LoraConfig", {"r": 4, "target_modules": ["embed_tokens", "o_proj"]}),
    "DoRA": ("LoraConfig", {"r": 4, "use_dora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "AdaLoRA": ("AdaLoraConfig", {"total_step": 10, "target_modules": ["q_proj", "v_proj"]}),
    "IA3": ("IA3Config", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "LoHa": ("LoHaConfig", {"r": 4, "target_modules": ["q_proj", "v_proj"]}),
    "LoKr": ("LoKrConfig", {"r": 4, "target_modules": ["q_proj", "v_proj"]}),
    "VeRA": ("VeraConfig", {"r": 4, "target_modules": ["q_proj", "v_proj"]}),
    "OFT": ("OFTConfig", {"oft_block_size": 8, "target_modules": ["q_proj", "v_proj"]}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 8, "target_modules": ["q_proj", "o_proj"]}),
    "layer norms": ("LNTuningConfig", {"target_modules": ["input_layernorm", "post_attention_layernorm", "norm"]}),
    "prompt tuning": ("PromptTuningConfig", {"num_virtual_tokens": 4}),
    "P-tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 4, "encoder_hidden_size": 16}),
    "P-tuning with an LSTM": (
        "PromptEncoderConfig",
        {"num_virtual_tokens": 4, "encoder_hidden_size": 16, "encoder_reparameterization_type": "LSTM"},
    ),
    "prefix tuning": ("PrefixTuningConfig", {"num_virtual_tokens": 4}),
    "prefix tuning, projected": (
        "PrefixTuningConfig",
        {"num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 16},
    ),
    "adaption prompts": ("AdaptionPromptConfig", {"adapter_len": 4, "adapter_layers": 2}),
}

T5: dict[str, Adapter] = {
    "LoRA": ("LoraConfig", {"r": 4, "lora_dropout": 0.1, "target_modules": ["q", "v"]}),
    "DoRA": ("LoraConfig", {"r": 4, "use_dora": True, "target_modules": ["q", "v", "wo"]}),
    "IA3": ("IA3Config", {"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]}),
    "prompt tuning": ("PromptTuningConfig", {"num_virtual_tokens": 4}),
    "P-tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 4, "encoder_hidden_size": 16}),
    "prefix tuning": ("PrefixTuningConfig", {"num_virtual_tokens": 4}),
}


def llama(transformers: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Return a Llama of four layers, with its batch."""
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    ids = torch.randint(WORDS, (ROWS, TOKENS))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return transformers.LlamaForCausalLM(config), batch


def t5(transformers: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Return a T5 with two layers on each side, with its batch."""
    config = transformers.T5Config(
        vocab_size=WORDS, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    ids = torch.randint(1, WORDS, (ROWS, TOKENS))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, : TOKENS // 2].contiguous()}
    return transformers.T5ForConditionalGeneration(config), batch


def perturbed(module: nn.Module) -> nn.Module:
    """Give adapters random values: they start as the identity, with half of their gradients zero."""
    with torch.no_grad():
        for leaf in module.parameters():
            if leaf.requires_grad:
                leaf.add_(torch.randn_like(leaf) * 0.05)
    return module


def adapted(
    make: Callable[[], tuple[nn.Module, dict[str, Any]]], peft: Any, adapter: Adapter, task: str, layouts: Any
) -> Case:
    """Return a model with an adapter."""
    module, batch = make()
    name, options = adapter
    module = peft.get_peft_model(module, getattr(peft, name)(task_type=task, **options))
    return Case(perturbed(module.train()), batch, layouts=layouts)


def hooked(make: Callable[[], tuple[nn.Module, dict[str, Any]]], peft: Any, hooks: Any) -> Case:
    """LoRA under accelerate's hooks on every part, as `dispatch_model` leaves them."""
    case = adapted(make, peft, LLAMA["LoRA"], "CAUSAL_LM", [*LAYOUTS, POINTS])
    hooks.add_hook_to_module(case.module, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True), append=True)
    for layer in case.module.get_submodule("base_model.model.model.layers").children():
        hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu"), append=True)
    return case


def compiled(make: Callable[[], tuple[nn.Module, dict[str, Any]]], peft: Any) -> Case:
    """LoRA, with `torch.compile` around each layer."""
    case = adapted(make, peft, LLAMA["LoRA"], "CAUSAL_LM", [*LAYOUTS, POINTS])
    layers: Any = case.module.get_submodule("base_model.model.model.layers")
    for name, layer in list(layers.named_children()):
        layers[int(name)] = torch.compile(layer)
    return case


def checkpointed(make: Callable[[], tuple[nn.Module, dict[str, Any]]], peft: Any) -> Case:
    """LoRA, with the layers' activations recomputed in the backward."""
    case = adapted(make, peft, LLAMA["LoRA"], "CAUSAL_LM", [*LAYOUTS, POINTS])
    base: Any = case.module.get_submodule("base_model.model")
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()
    return case


def cases() -> dict[str, Callable[[], Case]]:
    """Return builders by name."""
    try:
        peft, hooks = importlib.import_module("peft"), importlib.import_module("accelerate.hooks")
    except ImportError as error:
        raise SystemExit(f"error: {error}; {INSTALL}") from error
    transformers = importlib.import_module("transformers")
    causal, both = partial(llama, transformers), partial(t5, transformers)
    found: dict[str, Callable[[], Case]] = {}
    for name, adapter in LLAMA.items():
        found[f"Llama, {name}"] = partial(adapted, causal, peft, adapter, "CAUSAL_LM", [*LAYOUTS, POINTS])
    for name, adapter in T5.items():
        found[f"T5, {name}"] = partial(adapted, both, peft, adapter, "SEQ_2_SEQ_LM", LAYOUTS)
    found["Llama, LoRA, accelerate's hooks"] = partial(hooked, causal, peft, hooks)
    found["Llama, LoRA, compiled layers"] = partial(compiled, causal, peft)
    found["Llama, LoRA, checkpointed layers"] = partial(checkpointed, causal, peft)
    return found


def chosen(every: Mapping[str, Any], words: list[str]) -> list[str]:
    """Return the names that contain one of the words, or all if there are none."""
    return [name for name in every if not words or any(word in name for word in words)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="which, by a part of their names; all by default")
    every = cases()
    parser.add_argument("--check", action="store_true", help="ask af.check, too")
    given = parser.parse_args()
    print(table(try_all(every, chosen(every, given.names), checks=given.check)))

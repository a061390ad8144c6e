"""Experts of transformers, captured with rows sorted by expert: the module's own results for part of the work."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import autofunc as af
from autofunc.errors import ModelError
from autofunc.splitting import count_operations
from tests.captured.laws import check_layouts

_ALL: dict[str, Any] = {
    "vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 24, "num_experts_per_tok": 2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4, "output_router_logits": True},
    "Qwen3Moe": {"num_experts": 8, "moe_intermediate_size": 8, "head_dim": 8, "norm_topk_prob": True},
    "Olmoe": {"num_experts": 8, "num_experts_per_tok": 3},
    "DeepseekV3": {  # a sigmoid, groups of experts, and experts that all tokens share
        "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
        "moe_intermediate_size": 8, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
    "GptOss": {  # weights that lie the other way, biases, and a gate of its own
        "num_local_experts": 4, "head_dim": 8, "layer_types": ["full_attention"] * 2,
    },
}  # fmt: skip


def built(name: str, implementation: str = "eager") -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**_ALL, **MODELS[name]})
    module: nn.Module = getattr(transformers, f"{name}ForCausalLM")._from_config(
        config, experts_implementation=implementation, attn_implementation="sdpa" if name != "GptOss" else "eager"
    )
    for leaf in module.parameters():
        nn.init.normal_(leaf, std=0.1)  # biases too
    return module


def text(rows: int = 4) -> dict[str, Tensor]:
    ids = torch.randint(0, 23, (rows, 6), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("Mixtral", "eager"), ("DeepseekV3", "eager"), ("GptOss", "eager"),
        *(pytest.param(name, kind, marks=pytest.mark.full) for name in MODELS for kind in ("grouped_mm", "batched_mm")),
        *(pytest.param(name, "eager", marks=pytest.mark.full) for name in ("Qwen3Moe", "Olmoe")),
    ],
)  # fmt: skip
def test_a_captured_module_matches_the_module(name: str, implementation: str) -> None:
    module = built(name, implementation)
    table = transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS
    before, space = dict(table), importlib.import_module(type(module).__module__)
    balance = getattr(space, "load_balancing_loss_func", None)
    model = check_layouts(module, text(), [(["model.layers.1"], "zb_h1")], example=text(2))
    assert getattr(space, "load_balancing_loss_func", None) is balance
    assert dict(table) == before and module.config._experts_implementation == implementation
    assert not any("experts" in note for note in model.notes)


def test_the_work_is_that_of_the_chosen_experts() -> None:
    """The products of one layer's forward: attention, router, and k of E experts per token."""
    module, batch = built("Mixtral"), text()
    model = af.from_module(module, batch)
    flops = count_operations(model, batch)["model.layers.0"].flops
    tokens, width, hidden, k, count = 24, 16, 24, 2, 4
    attention = 2 * tokens * width * width * 4 + 4 * tokens * 6 * width
    assert flops == attention + 2 * tokens * width * count + 2 * tokens * k * 3 * width * hidden


def test_a_users_own_function_is_kept() -> None:
    """Here the user's function doubles the result."""
    table, module = transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS, built("Mixtral")
    batched = table["batched_mm"]
    table["doubled"] = lambda self, *args: 2 * batched(self, *args)
    module.config._experts_implementation = "doubled"
    try:
        batch = text()
        model = af.from_module(module, batch)
        loss = module(**batch).loss
    finally:
        del table["doubled"]
    found, _ = af.reference_value_and_grad(model, None, 1)(model.init(), batch)
    assert abs(found - loss) <= 1e-6 * abs(loss)


def test_experts_already_spread_over_processes() -> None:
    module = built("Mixtral")
    module.model.layers[1].mlp.experts._is_expert_parallel = True
    with pytest.raises(ModelError, match="MixtralExperts spreads its experts over processes itself"):
        af.from_module(module, text())

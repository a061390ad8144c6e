"""Adapters in PEFT's form: what PEFT 0.21.2 wrote is read, and what is written has its names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import autofunc as af
from autofunc.errors import ModelError
from autofunc.tree import flatten
from stages.llama import build_llama_model
from tests.adapters.cases import bases, batch_of_ids, llama, with_values
from tests.cases import assert_same_tree

# as PEFT 0.21.2 wrote it for r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], but for keys of the
# same kind as "eva_config"
WRITTEN_BY_PEFT: dict[str, Any] = {
    "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": None, "bias": "none", "corda_config": None,
    "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False,
    "inference_mode": True, "init_lora_weights": True, "layer_replication": None, "layers_pattern": None,
    "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 6, "lora_bias": False, "lora_dropout": 0.0,
    "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": ["lm_head"], "peft_type": "LORA",
    "peft_version": "0.21.2", "qalora_group_size": 16, "r": 2, "rank_pattern": {}, "revision": None,
    "target_modules": ["q_proj", "down_proj"], "target_parameters": None, "task_type": "CAUSAL_LM",
    "trainable_token_indices": None, "use_dora": False, "use_qalora": False, "use_rslora": False,
}  # fmt: skip
SHAPES = {"self_attn.q_proj": (16, 16), "mlp.down_proj": (16, 24)}  # (out, in)


def tensors() -> dict[str, Tensor]:
    """Names and shapes as in the file that PEFT wrote."""
    generator = torch.Generator().manual_seed(0)
    made = {"base_model.model.lm_head.weight": torch.randn(17, 16, generator=generator)}
    for block in range(2):
        for part, (out, features) in SHAPES.items():
            name = f"base_model.model.model.layers.{block}.{part}"
            made[f"{name}.lora_A.weight"] = torch.randn(2, features, generator=generator)
            made[f"{name}.lora_B.weight"] = torch.randn(out, 2, generator=generator)
    return made


def write(folder: Path, config: dict[str, Any], leaves: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(leaves, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def test_what_peft_wrote_is_read_and_does_what_it_did_there(tmp_path: Path) -> None:
    stored = tensors()
    model = af.load_adapter(bases()["llama"][0], write(tmp_path / "a", WRITTEN_BY_PEFT, stored))
    params = model.init()
    assert {f"base_model.model.{path}" for path in model.spec if model.is_trainable(path)} == set(stored)
    module = llama()
    with torch.no_grad():
        module.lm_head.weight.copy_(stored["base_model.model.lm_head.weight"])
        for block in range(2):
            for part in SHAPES:
                name = f"model.layers.{block}.{part}"
                a, b = (stored[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
                module.get_submodule(name).weight.add_(6 / 2 * b @ a)
    expected = module(**batch_of_ids()).logits
    torch.testing.assert_close(model(params, batch_of_ids())["logits"], expected, rtol=1e-4, atol=1e-5)


def test_what_is_written_has_pefts_names_and_is_read_back(tmp_path: Path) -> None:
    model = af.load_adapter(bases()["llama"][0], write(tmp_path / "a", WRITTEN_BY_PEFT, tensors()))
    trained = {path: leaf for path, leaf in flatten(model.init()).items() if model.is_trainable(path)}
    folder = af.save_adapter(model, trained, tmp_path / "b")  # the base need not be there
    found, stored = load_file(folder / "adapter_model.safetensors"), tensors()
    assert found.keys() == stored.keys() and all(torch.equal(found[name], stored[name]) for name in stored)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == [f"model.layers.{block}.{part}" for block in range(2) for part in sorted(SHAPES)]
    same = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "fan_in_fan_out", "bias", "modules_to_save")
    assert {key: config[key] for key in (*same, "task_type")} == {key: WRITTEN_BY_PEFT[key] for key in (*same, "task_type")}


def test_named_layers_are_called_what_they_are_in_transformers(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    named = build_llama_model(vocab_size=17, num_hidden_layers=2, **sizes)
    model = af.lora(named, ["q_proj", "down_proj"], rank=2, modules_to_save=["lm_head"])
    params = with_values(model)
    folder = af.save_adapter(model, params, tmp_path)
    assert load_file(folder / "adapter_model.safetensors").keys() == tensors().keys()
    back = af.load_adapter(named, folder)
    assert_same_tree(flatten(back.init(seed=7)), flatten(params))
    assert af.load_adapter(bases()["llama"][0], folder).plan.keys() == {f"model.{path}" for path in model.plan}


def test_conv1d_and_joined_weights(tmp_path: Path) -> None:
    """Factors of (in, out) weights are stored as PEFT has them; what transformers joins keeps its name here."""
    for name, targets in (("gpt2", ["c_attn"]), ("layers", ["attn.q"])):
        model = af.lora(bases()[name][0], targets, rank=2)
        params = with_values(model)
        folder = af.save_adapter(model, params, tmp_path / name)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["fan_in_fan_out"] == (name == "gpt2")
        back = af.load_adapter(bases()[name][0], folder)
        assert back.plan == model.plan
        assert_same_tree(flatten(back.init(seed=7) if name == "layers" else back.init()), flatten(params))


def test_what_is_no_plain_lora_or_fits_not_is_refused(tmp_path: Path) -> None:
    base, leaves = bases()["llama"][0], tensors()
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    wrong: list[tuple[dict[str, Any], dict[str, Tensor], str]] = [
        ({"peft_type": "IA3"}, leaves, "peft_type is 'IA3'; expected LORA"),
        ({"use_dora": True}, leaves, "'use_dora' is 'True'; only plain LoRA"),
        ({"alpha_pattern": {"q_proj": 4}}, leaves, "'alpha_pattern' is"),
        ({"bias": "all"}, leaves, "'bias' is 'all'"),
        ({"init_lora_weights": "pissa"}, leaves, "'init_lora_weights' is 'pissa'"),
        ({"lora_alpha": "six"}, leaves, "alpha='six'"),
        ({}, {**leaves, "base_model.model.model.other.lora_A.weight": torch.ones(1)}, "fits no weight of LlamaForCausalLM"),
        ({}, {**leaves, first: torch.ones(2, 9)}, r"is \(2, 9\), and the model needs \(2, 16\)"),
        ({}, {name: leaf for name, leaf in leaves.items() if name != first}, "lora_B.weight' fits no weight"),
    ]
    for number, (change, stored, words) in enumerate(wrong):
        folder = write(tmp_path / str(number), {**WRITTEN_BY_PEFT, **change}, stored)
        with pytest.raises(ModelError, match=words):
            af.load_adapter(base, folder)
    with pytest.raises(ModelError, match=r"adapter_config.json does not exist"):
        af.load_adapter(base, tmp_path / "none")

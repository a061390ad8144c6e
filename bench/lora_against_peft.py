"""Adapters here and in PEFT: the same gradients, and folders that both read. Needs `peft`, which is no dependency.

    python bench/lora_against_peft.py

In double precision, so that what is left is rounding: the largest difference of a gradient's element from PEFT's on the
unsplit module, over the gradient's largest element, of a pipeline of two stages (ZB-H1, two microbatches).
"""

from __future__ import annotations

import copy
import importlib
import tempfile
import warnings
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import autofunc as af
from autofunc.tree import flatten

VOCABULARY = 64
peft: Any = importlib.import_module("peft")


def modules() -> list[tuple[str, nn.Module, dict[str, Any]]]:
    """Title, module, what PEFT is told."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=4, **sizes))
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=32, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0)
    )
    return [
        (
            "Llama, q and down, head saved",
            llama,
            {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]},
        ),
        ("Llama, all-linear, rsLoRA", llama, {"target_modules": "all-linear", "use_rslora": True}),
        ("GPT-2 (Conv1D)", gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    ]


def compare(module: nn.Module, told: dict[str, Any], batch: dict[str, torch.Tensor]) -> str:
    """From PEFT to a pipeline, and back."""
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **told)
    theirs = peft.get_peft_model(copy.deepcopy(module), config, autocast_adapter_dtype=False).double().eval()
    for leaf in theirs.parameters():
        if leaf.requires_grad:
            nn.init.normal_(leaf, std=0.2)
    expected = theirs(**batch)
    expected.loss.backward()
    gradients = {
        name.removeprefix("base_model.model.").replace(".default", "").replace("modules_to_save.", ""): leaf.grad
        for name, leaf in theirs.named_parameters()
        if leaf.requires_grad
    }
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model = af.load_adapter(af.from_module(copy.deepcopy(module), batch), folder)
        params = model.init()
    names = list(model.layers)
    schedule = af.schedule.build("zb_h1", num_ranks=2, num_microbatches=2)
    loss, grads = af.value_and_grad(af.pipeline(af.split(model, [names[len(names) // 2]]), schedule))(params, batch)
    found = flatten(grads)
    assert found.keys() == gradients.keys()
    worst = max(((found[path] - leaf).abs().max() / leaf.abs().max()).item() for path, leaf in gradients.items())
    with tempfile.TemporaryDirectory() as folder:
        af.save_adapter(model, params, folder)
        back = peft.PeftModel.from_pretrained(copy.deepcopy(module), folder, autocast_adapter_dtype=False).eval()
    same = torch.equal(back(**batch).logits, expected.logits)
    plain, merged = af.merge_lora(model, params)
    off = (plain(merged, batch)["logits"] - theirs.merge_and_unload()(**batch).logits).abs().max().item()
    return f"loss {loss.item() - expected.loss.item():+.0e}, gradients {worst:.0e}, equal in PEFT: {same}, merged {off:.0e}"


def main() -> None:
    """Print a line for each module."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (4, 8))
    for title, module, told in modules():
        print(f"{title}: {compare(module.double().eval(), told, {'input_ids': ids, 'labels': ids})}")


if __name__ == "__main__":
    main()

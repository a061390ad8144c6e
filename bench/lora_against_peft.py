"""Compare adapters with PEFT's: gradients, and folders that both read. Needs `peft`, which is not a dependency.

    python bench/lora_against_peft.py

A pipeline of two stages (ZB-H1, two microbatches) against PEFT on the unsplit module and the same microbatches, in double
precision, where only rounding is left, and in single precision: the largest difference of a gradient's element, over that
gradient's largest element and over the largest of all.
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
    """Return titles, modules, and PEFT's options."""
    sizes = {"vocab_size": VOCABULARY, "num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 48}
    llama, grouped = (
        LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=heads, **sizes)) for heads in (4, 2)
    )
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
        ("Llama with grouped heads, all-linear, rsLoRA", grouped, {"target_modules": "all-linear", "use_rslora": True}),
        ("GPT-2 (Conv1D)", gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    ]


def compare(module: nn.Module, told: dict[str, Any], batch: dict[str, torch.Tensor]) -> str:
    """Convert from PEFT to a pipeline and back, and compare."""
    config = peft.LoraConfig(r=4, lora_alpha=10, task_type="CAUSAL_LM", **told)
    theirs = peft.get_peft_model(copy.deepcopy(module), config, autocast_adapter_dtype=False).eval()
    for leaf in theirs.parameters():
        if leaf.requires_grad:
            nn.init.normal_(leaf, std=0.2)
    expected = theirs(**batch)
    for first in (0, 2):
        (theirs(**{name: rows[first : first + 2] for name, rows in batch.items()}).loss / 2).backward()
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
    largest = max(leaf.abs().max() for leaf in gradients.values())
    off_by = {path: (found[path] - leaf).abs().max() for path, leaf in gradients.items()}
    of_own = max((off / gradients[path].abs().max()).item() for path, off in off_by.items())
    of_all = (max(off_by.values()) / largest).item()
    with tempfile.TemporaryDirectory() as folder:
        af.save_adapter(model, params, folder)
        back = peft.PeftModel.from_pretrained(copy.deepcopy(module), folder, autocast_adapter_dtype=False).eval()
    same = torch.equal(back(**batch).logits, expected.logits)
    plain, merged = af.merge_lora(model, params)
    off = (plain(merged, batch)["logits"] - theirs.merge_and_unload()(**batch).logits).abs().max().item()
    gradient = f"gradients {of_own:.0e} of their own largest element, {of_all:.0e} of the largest of all"
    return f"loss {loss.item() - expected.loss.item():+.0e}, {gradient}, equal in PEFT: {same}, merged {off:.0e}"


def main() -> None:
    """Print a line for each module."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (4, 8))
    torch.set_num_threads(1)
    for title, module, told in modules():
        for dtype in (torch.float64, torch.float32):
            found = compare(module.to(dtype).eval(), told, {"input_ids": ids, "labels": ids})
            print(f"{title}, {str(dtype).removeprefix('torch.')}: {found}")


if __name__ == "__main__":
    main()

"""Weights that do not fit, folders that are not complete: found before anything runs, and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import autofunc as af
from autofunc.captured.stored_tensors import StoredTensors
from autofunc.errors import ModelError
from tests.automodel.models import TinyConfig, TinyForCausalLM, assert_same, ids, real
from tests.captured.zoo import ZOO

SHARDED = "20KB"


def change(folder: Path, to: Path, edit: Callable[[dict[str, Tensor]], Any]) -> Path:
    shutil.copytree(folder, to, dirs_exist_ok=True)
    values = load_file(to / "model.safetensors")
    edit(values)
    save_file(values, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda v: v.pop("model.norm.weight"), r"not fit LlamaForCausalLM: it has no model\.norm\.weight; did you mean"),
        (lambda v: v.update(odd=torch.ones(1)), r"the module has no place for odd; "),
        (
            lambda v: v.update({"model.norm.weight": torch.ones(3)}),
            r"'model\.norm\.weight' is \(3,\), not \(32,\). Are the sizes",
        ),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit(saved: Any, tmp_path: Path, edit: Any, message: str) -> None:
    folder = change(saved("llama")[1], tmp_path, edit)
    with pytest.raises(ModelError, match=message):
        af.AutoModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.norm.weight", r"it has no model\.norm\.weight"),
        (
            "model.layers.1.block_sparse_moe.experts.3.w2.weight",
            r"'model.layers.1.mlp.experts.down_proj' is \(3, 32, 48\), not",
        ),
    ],
)
def test_converted_weights_that_do_not_fit(saved: Any, tmp_path: Path, name: str, message: str) -> None:
    folder = change(saved("mixtral")[1], tmp_path, lambda values: values.pop(name))
    with pytest.raises(ModelError, match=message):
        af.AutoModel.from_pretrained(folder)


def test_whole_models_that_do_not_fit(saved: Any, tmp_path: Path) -> None:
    module, folder = saved("llama")
    shutil.copy(folder / "config.json", tmp_path)
    values = {name: leaf for name, leaf in module.state_dict().items() if name != "model.norm.weight"}
    torch.save(values, tmp_path / "pytorch_model.bin")
    with pytest.warns(UserWarning):
        model = af.from_module(af.AutoModel.from_pretrained(tmp_path), ZOO["llama"][1]())
    with pytest.raises(ModelError, match=r"does not fit LlamaForCausalLM: missing keys: model\.norm\.weight"):
        model.init()


def test_tied_in_the_module_but_not_in_the_file(saved: Any, tmp_path: Path) -> None:
    folder = change(saved("gpt2")[1], tmp_path, lambda v: v.update({"lm_head.weight": v["transformer.wte.weight"] + 1}))
    model = af.from_module(af.AutoModel.from_pretrained(folder), ZOO["gpt2"][1]())
    with pytest.raises(ModelError, match="have different values, but in the module they are one parameter"):
        model.init()


def test_old_files_are_loaded_whole(saved: Any, tmp_path: Path) -> None:
    module, folder = saved("llama")
    shutil.copy(folder / "config.json", tmp_path)
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.warns(UserWarning, match="has no safetensors files"):
        pretrained = af.AutoModel.from_pretrained(tmp_path)
    assert_same(af.from_module(pretrained, ZOO["llama"][1]()).init(), real(module))


def test_folders_without_weights(saved: Any, tmp_path: Path) -> None:
    af.register_architecture(TinyForCausalLM)
    with pytest.raises(ModelError, match=r"no .*config\.json"):
        af.AutoModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["TinyForCausalLM"]}))
    with pytest.raises(
        ModelError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json; it has config\.json"
    ):
        af.AutoModel.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ModelError, match="is not a safetensors file"):
        af.AutoModel.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is a file; name the folder"):
        af.AutoModel.from_pretrained(tmp_path / "config.json")
    with pytest.raises(ModelError, match="no weights at"):
        af.from_module(TinyForCausalLM(TinyConfig()), ids(), weights=tmp_path / "absent")


def test_broken_indices(saved: Any, tmp_path: Path) -> None:
    _, folder = saved("llama", SHARDED)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    name, file = next(iter(index["weight_map"].items()))
    other = next(each for each in index["weight_map"].values() if each != file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**index["weight_map"], name: other}}))
    with pytest.raises(ModelError, match=f"has no '{name}', which model.safetensors.index.json says it has"):
        StoredTensors(tmp_path)
    (tmp_path / file).unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=f"names {file}, which is not there"):
        StoredTensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match="is not an index of shards"):
        StoredTensors(tmp_path)

"""Trained parameters as a folder that `from_pretrained` loads, in transformers and here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import autofunc as af
from autofunc import tree
from autofunc.automodel import write_pretrained
from autofunc.errors import ModelError
from autofunc.train.weights import save_weights
from tests.automodel.models import TinyConfig, TinyForCausalLM, assert_same, ids, real
from tests.captured.laws import assert_unchanged, contents
from tests.captured.zoo import ZOO

NAMES = ["gpt2", "llama", "mixtral", "t5", "bert", "vit"]


def trained(model: af.Model) -> Any:
    """Parameters that are nobody's initial ones."""
    return model.init().apply(lambda leaf: leaf + 0.01)


def loaded(module: nn.Module, folder: Path) -> Any:
    cls: Any = type(module)
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert "missing_keys" in info and not any(info.values()), info
    return model


@pytest.mark.parametrize(
    ("name", "shards"),
    [
        *((name, "20KB") for name in NAMES),
        ("gpt2", "5GB"),
        *(pytest.param(name, "5GB", marks=pytest.mark.full) for name in NAMES if name != "gpt2"),
    ],
)
def test_transformers_loads_the_same_bits(name: str, shards: str, tmp_path: Path) -> None:
    module, batch = ZOO[name][0](), ZOO[name][1]()
    model = af.from_module(module, batch)
    params = trained(model)
    before = contents(module)
    assert af.AutoModel.export(model, params, tmp_path / "out", max_shard_size=shards) == tmp_path / "out"
    assert_unchanged(before, module)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (shards == "20KB")
    found = loaded(module, tmp_path / "out")
    assert_same(real(found), tree.flatten(params))
    assert torch.allclose(found(**batch).logits, model(params, batch).logits, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_of_a_module_without_values(name: str, tmp_path: Path) -> None:
    module = ZOO[name][0]()
    empty = af.AutoModel.from_config(module.config, architectures=[type(module).__name__])
    params = {path: leaf.bfloat16() for path, leaf in real(module).items()}
    write_pretrained(empty, params, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["architectures"] == [type(module).__name__]
    assert_same(real(loaded(module, tmp_path)), params)
    assert all(leaf.is_meta for leaf in empty.parameters() if leaf.dim() > 1)


def test_a_round_trip_keeps_the_bytes_and_how_to_generate(tmp_path: Path) -> None:
    module: Any = ZOO["t5"][0]()
    module.generation_config.max_new_tokens = 7
    module.save_pretrained(tmp_path / "a")
    pretrained = af.AutoModel.from_pretrained(tmp_path / "a")
    model = af.from_module(pretrained, ZOO["t5"][1]())
    for given in (model, pretrained):
        af.AutoModel.export(given, model.init(), tmp_path / "b")
        for name in ("model.safetensors", "config.json", "generation_config.json"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_from_a_file_that_training_wrote(tmp_path: Path) -> None:
    module, batch = ZOO["gpt2"][0](), ZOO["gpt2"][1]()
    params = trained(af.from_module(module, batch))
    save_weights(params, tmp_path / "model.safetensors")
    for given in (tmp_path, str(tmp_path / "model.safetensors")):
        write_pretrained(module, given, tmp_path / "out")
        assert_same(real(loaded(module, tmp_path / "out")), tree.flatten(params))


def test_what_no_layer_uses_comes_from_where_the_module_came_from(tmp_path: Path) -> None:
    own = TinyForCausalLM(TinyConfig())
    own.unused = nn.Linear(2, 2).requires_grad_(False)
    params = af.from_module(own, ids()).init()
    write_pretrained(own, params, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("unused.weight"), own.unused.weight)
    own.unused = nn.Linear(2, 2, device="meta").requires_grad_(False)
    with pytest.raises(ModelError, match=r"params have no 'unused\.weight', one of 2 missing parameters"):
        write_pretrained(own, params, tmp_path)


# --- a module of one's own


@pytest.mark.parametrize("shards", ["5GB", "500"])
def test_registered(tmp_path: Path, shards: str) -> None:
    af.register_architecture(TinyForCausalLM)
    module = TinyForCausalLM(TinyConfig())
    module.get_buffer("scale").mul_(3)
    model = af.from_module(module, ids())
    params = trained(model)
    size: Any = int(shards) if shards.isdigit() else shards
    af.AutoModel.export(model, params, tmp_path, max_shard_size=size)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {
        "architectures": ["TinyForCausalLM"], "model_type": "tiny", "dtype": "float32",
        "vocab_size": 20, "hidden_size": 8, "num_layers": 2,
    }  # fmt: skip
    again = af.from_module(af.AutoModel.from_pretrained(tmp_path), ids())
    assert_same(again.init(), tree.flatten(params))
    assert torch.equal(again(again.init(), ids()), model(params, ids()))
    first = {file.name for file in tmp_path.iterdir()}
    af.AutoModel.export(model, params, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert ("model.safetensors.index.json" in first) == (shards == "500")
    assert len(first) == 2 if shards == "5GB" else len(first) > 3


def test_registered_under_another_name_with_a_dict_as_config(tmp_path: Path) -> None:
    @af.register_architecture("MyArch")
    class Decoder(nn.Module):
        def __init__(self, config: dict[str, Any]) -> None:
            super().__init__()
            self.config, self.layers = config, nn.ModuleList(nn.Linear(config["width"], config["width"]) for _ in "ab")

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    batch = {"x": torch.ones(2, 3)}
    model = af.from_module(Decoder({"width": 3}), batch)
    write_pretrained(model, model.init(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architectures"], config["model_type"], config["width"]) == (["MyArch"], "my_arch", 3)
    again = af.from_module(af.AutoModel.from_pretrained(tmp_path), batch)
    assert_same(again.init(), tree.flatten(model.init()))
    config.pop("architectures")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(af.AutoModel.from_config(tmp_path)) is Decoder


@dataclass
class Odd:
    width: int
    what: object


def test_errors(tmp_path: Path) -> None:
    module = TinyForCausalLM(TinyConfig())
    good = real(module)
    with pytest.raises(ModelError, match=r"has no parameter 'embed\.wieght'; did you mean embed\.weight"):
        write_pretrained(module, {**good, "embed.wieght": torch.ones(1)}, tmp_path)
    with pytest.raises(ModelError, match=r"'embed.weight' is \(3,\), but \(20, 8\) in TinyForCausalLM"):
        write_pretrained(module, {**good, "embed.weight": torch.ones(3)}, tmp_path)
    empty = af.AutoModel.from_config({"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 1, "vocab_size": 9})
    with pytest.raises(ModelError, match=r"params have no .*full tree, with all stages"):
        write_pretrained(empty, {"transformer.wte.weight": torch.ones(9, 8)}, tmp_path)
    module.config = None  # type: ignore[assignment]
    with pytest.raises(ModelError, match="TinyForCausalLM has no config attribute"):
        write_pretrained(module, good, tmp_path)
    module.config = Odd(3, object())  # type: ignore[assignment]
    with pytest.raises(ModelError, match="cannot be written as JSON: 'what' is"):
        write_pretrained(module, good, tmp_path)
    assert not list(tmp_path.iterdir())
    function = af.from_function(lambda p, b: b["x"] * p["w"], {"w": torch.ones(2)}, {"x": torch.ones(2, 2)})
    with pytest.raises(ModelError, match=r"expected a model made by af\.from_module"):
        write_pretrained(function, {"w": torch.ones(2)}, tmp_path)

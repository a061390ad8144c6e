"""Weights that are read from files, a tensor when it is asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import autofunc as af
from autofunc import tree
from autofunc.automodel.in_transformers import WholeModel
from autofunc.captured.module_source import ModuleSource
from autofunc.captured.pretrained import Pretrained, SafetensorsWeights, StoredTensors
from autofunc.errors import ModelError
from autofunc.train.weights import save_weights
from tests.automodel.models import TinyConfig, TinyForCausalLM, assert_same, gradients, ids, real
from tests.captured.zoo import ZOO
from tests.cases import pp_mesh
from tests.pool import WorkerPool

SHARDED = "20KB"


@pytest.mark.parametrize(
    ("name", "shards"),
    [
        *((name, SHARDED) for name in ("gpt2", "llama", "t5", "bert", "vit")),
        ("llama", "5GB"),
        *(pytest.param(name, "5GB", marks=pytest.mark.full) for name in ("gpt2", "t5", "bert", "vit")),
    ],
)
def test_values_are_those_of_the_files(saved: Any, name: str, shards: str) -> None:
    module, folder = saved(name, shards)
    assert (folder / "model.safetensors.index.json").exists() == (shards == SHARDED)
    pretrained = af.AutoModel.from_pretrained(folder)
    assert all(leaf.is_meta for leaf in pretrained.module.parameters())
    assert isinstance(pretrained.weights, SafetensorsWeights) and pretrained.weights.note is None
    model = af.from_module(pretrained, ZOO[name][1]())
    assert_same(model.init(), real(module))
    batch = ZOO[name][1]()
    assert torch.allclose(model(model.init(), batch).logits, module(**batch).logits, atol=1e-5)


@pytest.mark.parametrize("shards", ["5GB", SHARDED])
def test_what_is_stored_in_another_form_is_converted_when_asked_for(saved: Any, shards: str, reads: list[str]) -> None:
    module, folder = saved("mixtral", shards)
    pretrained = af.AutoModel.from_pretrained(folder)
    assert pretrained.weights.note is None
    model = af.from_module(pretrained, ZOO["mixtral"][1]())
    assert reads == []
    model.init_paths([path for path in model.spec if path.startswith("model.layers.2.")], 0, "cpu")
    assert len(reads) == len(set(reads)) > 12 and all(name.startswith("model.layers.2.") for name in reads)
    assert_same(model.init(), real(module))


@pytest.mark.parametrize("shards", ["5GB", SHARDED])
def test_else_transformers_loads_it_whole(
    saved: Any, shards: str, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    from transformers import core_model_loading

    module, folder = saved("mixtral", shards)
    monkeypatch.delattr(core_model_loading, "dot_natural_key")
    with pytest.warns(UserWarning, match="every process loads the whole model.*cannot be applied to one tensor at a time"):
        pretrained = af.AutoModel.from_pretrained(folder)
    monkeypatch.undo()
    assert isinstance(pretrained.weights, WholeModel) and "MixtralForCausalLM" in str(pretrained.weights.note)
    assert_same(af.from_module(pretrained, ZOO["mixtral"][1]()).init(), real(module))
    assert reads == []


def test_a_stage_reads_its_own_tensors_only(saved: Any, reads: list[str]) -> None:
    _, folder = saved("llama", SHARDED)
    model = af.from_module(af.AutoModel.from_pretrained(folder), ZOO["llama"][1]())
    assert reads == []
    paths = [path for path in model.spec if path.startswith("model.layers.2.")]
    found = model.init_paths(paths, 0, "cpu")
    assert sorted(reads) == sorted(paths) == sorted(found)
    reads.clear()
    model.init(device="meta")
    assert reads == []


def test_tied_parameters_are_read_once(saved: Any, reads: list[str]) -> None:
    module, folder = saved("t5")
    model = af.from_module(af.AutoModel.from_pretrained(folder), ZOO["t5"][1]())
    model.init()
    assert sorted(reads) == sorted(real(module))


def test_two_processes_read_their_stages(saved: Any, workers: WorkerPool) -> None:
    module, folder = saved("gpt2", SHARDED)
    expected = set(real(module))
    results = workers.run(_init_on_gloo, folder)
    assert set(results[0][0]) | set(results[1][0]) == expected
    assert len(results[0][0]) < len(expected) > len(results[1][0])
    for _, gathered in results:
        assert_same(gathered, real(module))


def _init_on_gloo(folder: Path) -> tuple[list[str], Any]:
    found: list[str] = []
    original = StoredTensors.read
    try:
        StoredTensors.read = lambda self, names: original(self, found.extend(listed := list(names)) or listed)  # type: ignore
        model = af.from_module(af.AutoModel.from_pretrained(folder), ZOO["gpt2"][1]())
        s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=2)
        pipe = af.pipeline(af.split(model, 2), s, mesh=pp_mesh(2))
        return found, pipe.gather(pipe.init())
    finally:
        StoredTensors.read = original  # type: ignore[method-assign]


def test_dtypes(saved: Any) -> None:
    module, folder = saved("gpt2", dtype=torch.bfloat16)
    batch = ZOO["gpt2"][1]()
    assert_same(af.from_module(af.AutoModel.from_pretrained(folder), batch).init(), real(module))
    wide = {name: leaf.float() for name, leaf in real(module).items()}
    assert_same(af.from_module(af.AutoModel.from_pretrained(folder, dtype="float32"), batch).init(), wide)
    assert_same(af.from_module(af.AutoModel.from_pretrained(folder), batch).init(dtype=torch.float32), wide)


@pytest.mark.parametrize("shards", ["5GB", SHARDED])
def test_a_prefix_may_be_stored_or_not(saved: Any, tmp_path: Path, shards: str) -> None:
    module, folder = saved("gpt2", shards)
    without = {name.removeprefix("transformer."): leaf.contiguous() for name, leaf in real(module).items()}
    shutil.copy(folder / "config.json", tmp_path)
    save_file(without | {"h.0.attn.bias": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same(af.from_module(af.AutoModel.from_pretrained(tmp_path), ZOO["gpt2"][1]()).init(), real(module))
    base: Any = module
    weights = SafetensorsWeights(_renamed(folder, tmp_path, lambda name: f"transformer.{name}"), base.transformer)
    assert_same(weights.read(real(base.transformer)), real(base.transformer))


def _renamed(folder: Path, to: Path, rename: Callable[[str], str]) -> Path:
    names = StoredTensors(folder)
    values = names.read(names.shapes)
    stripped = {rename(name.removeprefix("transformer.")): leaf for name, leaf in values.items()}
    save_file(stripped, to / "renamed.safetensors", metadata={"format": "pt"})
    return to / "renamed.safetensors"


def test_frozen_parameters_get_no_gradient(saved: Any) -> None:
    _, folder = saved("llama")
    batch = ZOO["llama"][1]()
    pretrained = af.AutoModel.from_pretrained(folder, trainable=["lm_head*", "*.layers.3.*"])
    model = af.from_module(pretrained, batch)
    found = set(gradients(model, batch, model.init()))
    assert found == {name for name in model.spec if name.startswith(("lm_head", "model.layers.3."))}
    other = af.from_module(pretrained, batch, trainable=["lm_head*"])
    assert set(gradients(other, batch, other.init())) == {"lm_head.weight"}
    with pytest.raises(ModelError, match=r"trainable pattern 'lmhead\*' matches no parameter; did you mean lm_head.weight"):
        af.AutoModel.from_pretrained(folder, trainable=["lmhead*"])
    with pytest.raises(ModelError, match=r"matches lm_head\.weight, which is tied to transformer\.wte\.weight; name that"):
        af.AutoModel.from_pretrained(saved("gpt2")[1], trainable=["lm_head*"])


def test_parameters_that_are_not_used_may_be_frozen_by_patterns() -> None:
    module = TinyForCausalLM(TinyConfig())
    module.extra = nn.Linear(2, 2)
    assert any("no layer uses extra.weight" in note for note in af.from_module(module, ids()).notes)
    assert not af.from_module(module, ids(), trainable=["blocks*"]).notes


# --- a module of one's own


def tiny(folder: Path) -> TinyForCausalLM:
    """Real, with a buffer that is not what its initialiser makes, and a file of it."""
    torch.manual_seed(0)
    module = TinyForCausalLM(TinyConfig())
    module.get_buffer("scale").mul_(torch.randn(8))
    stored = {name: leaf.contiguous() for name, leaf in module.state_dict().items() if name != "embed.weight"}
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": ["TinyForCausalLM"]}))
    return module


def test_registered_with_a_buffer_and_under_another_tied_name(tmp_path: Path, reads: list[str]) -> None:
    af.register_architecture(TinyForCausalLM)
    module = tiny(tmp_path)
    pretrained = af.AutoModel.from_pretrained(tmp_path)
    assert type(pretrained.module) is TinyForCausalLM and pretrained.module.training
    model = af.from_module(pretrained, ids())
    assert reads == ["scale"]  # a constant of the graph
    assert_same(model.init(), real(module))
    assert torch.equal(model(model.init(), ids()), module(**ids()))


def test_a_parameter_that_was_given_a_value_keeps_it(tmp_path: Path) -> None:
    af.register_architecture(TinyForCausalLM)
    tiny(tmp_path)
    pretrained = af.AutoModel.from_pretrained(tmp_path)
    pretrained.module.lm_head = nn.Linear(8, 3)  # another task
    model = af.from_module(pretrained, ids())
    assert torch.equal(model.init()["lm_head", "weight"], pretrained.module.lm_head.weight)
    pretrained.module.to_empty(device="meta").embed = nn.Embedding(30, 8, device="meta")
    with pytest.raises(ModelError, match=r"'embed\.weight' is stored as \(20, 8\), but in TinyForCausalLM it is \(30, 8\)"):
        ModuleSource(pretrained.module, stored=pretrained.weights).weights(["embed.weight"], 0, torch.device("cpu"), None)


@pytest.mark.parametrize("meta", [False, True])
def test_weights_for_any_module(tmp_path: Path, meta: bool) -> None:
    module = tiny(tmp_path)
    with torch.device("meta" if meta else "cpu"):
        other = TinyForCausalLM(TinyConfig())
    other.order = torch.arange(8)
    for path in (tmp_path, str(tmp_path / "model.safetensors")):
        model = af.from_module(other, ids(), weights=path)
        assert_same(model.init(), real(module))
        assert torch.equal(model(model.init(), ids()), module(**ids()))


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "bert"])
def test_weights_that_training_wrote(tmp_path: Path, name: str) -> None:
    batch = ZOO[name][1]()
    trained = af.from_module(ZOO[name][0](), batch)
    params = trained.init().apply(lambda leaf: leaf + 1)
    save_weights(params, tmp_path / "model.safetensors")
    model = af.from_module(ZOO[name][0](), batch, weights=tmp_path)
    assert_same(model.init(), tree.flatten(params))


def test_weights_of_another_form_are_refused(saved: Any) -> None:
    module, folder = saved("mixtral")
    with pytest.raises(ModelError, match=r"load it with af\.AutoModel\.from_pretrained"):
        af.from_module(module, ZOO["mixtral"][1](), weights=folder)


def test_a_model_in_the_cache_of_the_hub(saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    module, folder = saved("llama")
    commit = "a" * 40
    home = tmp_path / "models--team--small-llama"
    shutil.copytree(folder, home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    pretrained = af.AutoModel.from_pretrained("team/small-llama")
    assert isinstance(pretrained, Pretrained)
    assert_same(af.from_module(pretrained, ZOO["llama"][1]()).init(), real(module))
    with pytest.raises(ModelError, match="did you mean team/small-llama"):
        af.AutoModel.from_pretrained("team/smal-llama")

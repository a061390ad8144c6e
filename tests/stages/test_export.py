"""`write_pretrained` of a model of pure layers: transformers loads the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import autofunc as af
from autofunc import tree
from autofunc.automodel import write_pretrained
from autofunc.errors import ModelError
from autofunc.train.weights import save_weights
from stages.gpt2 import build_gpt2_model
from stages.llama import build_llama_model
from stages.mlp import build_mlp_model
from stages.moe import build_moe_model
from tests.cases import assert_same_tree
from tests.cli.here import run_here
from tests.stages.families import FAMILIES, SIZES


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_loads_it(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model, params = family.ours(family.theirs())
    save_weights(params, tmp_path / "model.safetensors")
    out = write_pretrained(model, tmp_path / "model.safetensors", tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    again = family.module.config_from_hf(config)
    sizes = ("kv_heads", "features_per_head", "decoder_layers", "mlp_width")  # what None stands for
    assert {name: getattr(again, name) for name in sizes if hasattr(again, name)} == {
        name: getattr(model.config, name) for name in sizes if hasattr(model.config, name)
    }
    cls: Any = getattr(transformers, config["architectures"][0])
    theirs, info = cls.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert_same_tree(params, family.module.from_hf(theirs.state_dict(), model.config))
    batch = {entry: leaf for entry, leaf in family.batch(3).items() if entry != "labels"}
    with torch.no_grad():
        found, expected = theirs.eval()(**batch, use_cache=False).logits, model(params, batch)
    expected = expected["logits"] if isinstance(expected, dict) else expected
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_by_the_command(tmp_path: Path) -> None:
    """The model of README's configuration, smaller."""
    sizes = {"vocab_size": 256, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    target = {"_target_": "stages.gpt2.build_gpt2_model", **sizes}
    data = {"_target_": "autofunc.data.TextFolder", "seq_len": 8}
    steps = {"global_batch_size": 4, "local_batch_size": 2}
    run = {"model": target, "dataset": data, "step_scheduler": steps, "optimizer": {"_target_": "torch.optim.SGD"}}
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    params = build_gpt2_model(**sizes).init(seed=3)
    save_weights(params, tmp_path / "model.safetensors")
    done = run_here(tmp_path, "export", "-c", "run.yaml", "--weights", "model.safetensors", "-o", "out")
    assert (done.status, done.out) == (0, "written to out\n"), done.err
    theirs: Any = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert torch.equal(theirs.transformer.wte.weight, params["wte", "weight"])


def test_errors(tmp_path: Path) -> None:
    both = build_llama_model(**SIZES, attention_bias=True, sliding_window=4)
    mixed = build_moe_model(**{**SIZES, "num_local_experts": 2}, use_qk_norm=True)
    plain = build_mlp_model()
    lacking = {"embed_tokens.weight": torch.ones(19, 16)}
    for model, params, message in (
        (both, both.init(), "no transformers model has attention_bias and sliding_window"),
        (mixed, mixed.init(), "the Mixtral of transformers has no use_qk_norm"),
        (plain, plain.init(), r"has no form in transformers; give it af\.Model\(\.\.\., in_transformers"),
        (build_llama_model(**SIZES), lacking, r"params have no 'layers\.0.*pipe\.gather"),
    ):
        with pytest.raises(ModelError, match=message):
            write_pretrained(model, params, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_custom_models_can_be_exported(tmp_path: Path) -> None:
    layer = af.Layer(init=lambda key: {"weight": key.normal("weight", (2, 2))}, apply=lambda params, x, batch: x)
    told = {"model_type": "mine", "architectures": ["Mine"]}
    model = af.Model({"a": layer}, in_transformers=lambda params: (told, {"b.weight": tree.flatten(params)["a.weight"]}))
    af.AutoModel.export(model, model.init(dtype=torch.bfloat16), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {**told, "dtype": "bfloat16"}

"""Every model against that of transformers, and in a pipeline."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import autofunc as af
from autofunc.errors import ModelError
from autofunc.tree import flatten
from stages import encoder_decoder, gpt2, llama, moe
from stages.huggingface import MODEL_TYPES
from tests.cases import assert_same_tree, cut_evenly
from tests.stages.families import FAMILIES, LLAMA3, SIZES, Family

MAY_BE_NONE = {"head_dim", "num_key_value_heads", "num_decoder_layers"}  # compared by the properties that say what None is
ALL = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@ALL
def test_logits_equal_transformers(family: Family) -> None:
    theirs = family.theirs()
    model, params = family.ours(theirs)
    batch = family.batch(3)
    with torch.no_grad():
        expected = theirs(**{name: leaf for name, leaf in batch.items() if name != "labels"}, use_cache=False).logits
        found = model(params, batch)
    found = found["logits"] if isinstance(found, dict) else found
    assert expected.std() > 0.1, "weights too small to compare anything"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@ALL
def test_weights_round_trip(family: Family) -> None:
    theirs = family.theirs()
    model, params = family.ours(theirs)
    state = theirs.state_dict()
    back = family.module.to_hf(params, model.config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) and back[name].is_contiguous() for name in state)
    assert theirs.load_state_dict(back, strict=True)
    own = model.init(seed=5)
    assert_same_tree(own, family.module.from_hf(family.module.to_hf(own, model.config), model.config))


@ALL
def test_gradients_equal_transformers(family: Family) -> None:
    theirs = family.theirs()
    model, params = family.ours(theirs)
    batch = family.batch(3)
    logits = theirs(**{name: leaf for name, leaf in batch.items() if name != "labels"}, use_cache=False).logits
    total, weight = af.losses.causal_lm(logits, batch)
    (total / weight).backward()
    loss = partial(family.loss, router_aux_loss_coef=0.0) if family.loss is moe.moe_causal_lm else family.loss
    found_loss, found = af.reference_value_and_grad(model, loss, 1)(params, batch)
    torch.testing.assert_close(found_loss, (total / weight).detach())
    expected = family.module.from_hf({name: p.grad for name, p in theirs.named_parameters()}, model.config)
    largest = max(
        leaf.abs().max().item() for leaf in flatten(expected).values()
    )  # a bias of keys has none: what is left is noise
    for path, leaf in flatten(expected).items():
        torch.testing.assert_close(flatten(found)[path], leaf, rtol=1e-4, atol=2e-6 * largest, msg=path)


@ALL
def test_weights_from_files(family: Family, tmp_path: Path) -> None:
    theirs = family.theirs()
    theirs.save_pretrained(tmp_path)
    model, params = family.ours(theirs)
    assert_same_tree(params, family.module.from_hf(load_file(tmp_path / "model.safetensors"), model.config))
    config = json.loads((tmp_path / "config.json").read_text())
    assert family.module.config_from_hf(config) == model.config


@pytest.mark.parametrize(
    "name", [name for name in FAMILIES if name not in ("mistral", "llama linear")]
)  # these are "llama"
@pytest.mark.parametrize(
    ("schedule", "ranks", "engine"),
    [("1f1b", 2, "eager"), ("zb_h1", 4, "graph"), pytest.param("1f1b", 3, "graph", marks=pytest.mark.full)],
)
def test_a_pipeline_equals_the_plain_loop(name: str, schedule: str, ranks: int, engine: str) -> None:
    family = FAMILIES[name]
    model = family.build(**vars(family.module.config_from_hf(family.theirs().config)))
    params, batch, key = model.init(seed=2), family.batch(8), (1, 2)
    loss = partial(family.loss, router_aux_loss_coef=0.5) if family.loss is moe.moe_causal_lm else family.loss
    expected_loss, expected = af.reference_value_and_grad(model, loss, 4)(params, batch, key)
    s = af.schedule.build(schedule, num_ranks=ranks, num_microbatches=4)
    pipe = af.pipeline(cut_evenly(model, ranks), s, loss=loss, engine=engine)
    found_loss, found = af.value_and_grad(pipe)(params, batch, key)
    assert torch.equal(found_loss, expected_loss)
    assert_same_tree(expected, found)
    assert all(leaf.abs().max() > 0 for leaf in found.values(True, True)), "everything is learnt"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"model_type": "lama"}, "llama: unknown model_type 'lama'; did you mean llama"),
        ("llama", {"model_type": "mixtral"}, "llama: model_type 'mixtral' is built by stages.moe"),
        ("llama", {"hidden_act": "gelu"}, "llama: hidden_act='gelu' is not supported; expected 'silu'"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True is not supported"),
        ("llama", {"hidden_size": None}, "the configuration has no 'hidden_size'"),
        ("llama", {"num_key_value_heads": 3}, "num_attention_heads=4 is not divisible by num_key_value_heads=3"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn"}},
            "type 'yarn' is not supported; known: default, linear, llama3",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "linear"}, "rope_parameters": None},
            "'linear' has factor=None; expected a number",
        ),
        ("llama", {"rope_parameters": {"full_attention": {}}}, "rope_parameters by type of layer are not supported"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not supported"),
        ("mistral", {"sliding_window": 0}, "sliding_window=0, expected at least 1, or None"),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 4, "layer_types": None, "max_window_layers": 1},
            "a sliding window in some layers only is not supported",
        ),
        ("mixtral", {"router_jitter_noise": 0.1}, "moe: router_jitter_noise=0.1 is not supported; expected 0.0"),
        ("mixtral", {"num_experts_per_tok": 6}, "moe: num_experts_per_tok=6, expected from 1 to num_local_experts=5"),
        ("t5 v1.0", {"feed_forward_proj": "gated-silu"}, "'gated-silu' is not supported; did you mean gated-gelu"),
        ("t5 v1.0", {"relative_attention_num_buckets": 5}, "relative_attention_num_buckets=5, expected an even number"),
        ("t5 v1.0", {"relative_attention_max_distance": 4}, "max_distance=4, expected more than half of"),
        ("t5 v1.0", {"num_heads": 0}, "num_heads=0, expected at least 1"),
        ("gpt2", {"activation_function": "relu"}, "gpt2: activation_function='relu' is not supported; expected 'gelu_new'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True is not supported"),
    ],
)
def test_configurations_that_are_refused(name: str, changes: dict[str, Any], message: str) -> None:
    family = FAMILIES[name]
    given = {"model_type": family.kind.lower(), **family.settings}
    family.module.config_from_hf(given)
    with pytest.raises(ModelError, match=message):
        family.module.config_from_hf({**given, **changes})


def test_other_objects_are_refused() -> None:
    with pytest.raises(ModelError, match="llama: a str is not a configuration; expected one of transformers, or its dict"):
        llama.config_from_hf("meta-llama/Llama-3.1-8B")


@ALL
def test_state_dicts_that_are_refused(family: Family) -> None:
    model, params = family.ours(family.theirs())
    state = family.module.to_hf(params, model.config)
    norm = next(name for name in state if "norm" in name or "ln" in name)
    with pytest.raises(ModelError, match="the state dict has no '"):
        family.module.from_hf({name: leaf for name, leaf in state.items() if name != norm}, model.config)
    with pytest.raises(ModelError, match="has 'extra', which this model does not know"):
        family.module.from_hf({**state, "extra": torch.zeros(1)}, model.config)
    with pytest.raises(ModelError, match=r"the shape \(3,\); expected \(16,\)"):
        family.module.from_hf({**state, norm: torch.zeros(3)}, model.config)
    if "lm_head.weight" in model.ties or "head.weight" in model.ties:
        with pytest.raises(ModelError, match=r"lm_head.weight differs from .*, but this model ties them"):
            family.module.from_hf({**state, "lm_head.weight": state["lm_head.weight"] + 1}, model.config)


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("gpt2", "transformer.h.0.attn.masked_bias"),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("t5 v1.0", "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"),
    ],
)
def test_unused_entries_of_old_files_are_ignored(name: str, extra: str) -> None:
    family = FAMILIES[name]
    theirs = family.theirs()
    model, params = family.ours(theirs)
    assert_same_tree(params, family.module.from_hf({**theirs.state_dict(), extra: torch.zeros(2)}, model.config))


def test_every_known_model_type_has_its_module() -> None:
    found = {family.kind.lower(): family.module.__name__.removeprefix("stages.") for family in FAMILIES.values()}
    assert found == MODEL_TYPES


def test_positions_of_both_generations_of_configurations() -> None:
    now = llama.config_from_hf({"model_type": "llama", **SIZES, "rope_parameters": LLAMA3})
    scaling = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    before = llama.config_from_hf({"model_type": "llama", **SIZES, "rope_theta": 500.0, "rope_scaling": scaling})
    assert now == before and now.rope_theta == 500.0 and now.rope_scaling == scaling
    plain = llama.config_from_hf({"model_type": "llama", **SIZES, "rope_scaling": None})
    assert (plain.rope_theta, plain.rope_scaling) == (10000.0, None)


def test_defaults_equal_transformers() -> None:
    """A file may leave out what its class has by default."""
    from transformers import GPT2Config, LlamaConfig, MistralConfig, MixtralConfig, Qwen3Config, T5Config

    modules = [gpt2, llama, llama, moe, llama, encoder_decoder]
    configs = [GPT2Config(), LlamaConfig(), MistralConfig(), MixtralConfig(), Qwen3Config(), T5Config()]
    for module, config in zip(modules, configs, strict=True):
        least = {"model_type": config.model_type, **{name: getattr(config, name) for name in module.SIZES}}
        expected, found = module.config_from_hf(config), module.config_from_hf(least)
        for name in {*vars(found), "features_per_head", "kv_heads", "decoder_layers"} - MAY_BE_NONE:
            assert getattr(found, name, None) == getattr(expected, name, None), (config.model_type, name)

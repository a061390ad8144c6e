"""GPT-2 against that of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import autofunc as af
from autofunc.errors import ModelError
from autofunc.tree import flatten
from stages.gpt2 import build_gpt2_model, from_hf

SIZES = {"vocab_size": 61, "n_positions": 24, "n_embd": 32, "n_layer": 3, "n_head": 4}


@pytest.fixture
def theirs() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    module = GPT2LMHeadModel(GPT2Config(**SIZES)).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # biases and norms too
    return module


def test_loss_and_gradients_equal_transformers(theirs: GPT2LMHeadModel) -> None:
    model = build_gpt2_model(**SIZES)
    params = from_hf(theirs.state_dict(), model.config)
    ids = torch.randint(0, 61, (4, 25))
    loss = theirs(ids[:, :24], labels=None, use_cache=False).logits.flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(loss, ids[:, 1:].flatten())
    loss.backward()
    s = af.schedule.build("1f1b", num_ranks=3, num_microbatches=2)
    pipe = af.pipeline(af.split(model, ["h.1", "ln_f"]), s, loss=af.losses.causal_lm)
    found_loss, grads = af.value_and_grad(pipe)(params, {"input_ids": ids[:, :24], "labels": ids[:, 1:]})
    assert torch.allclose(found_loss, loss, atol=1e-5)
    expected = from_hf({name: p.grad for name, p in theirs.named_parameters()}, model.config)
    for path, leaf in flatten(grads).items():
        assert torch.allclose(leaf, flatten(expected)[path], atol=1e-5, rtol=1e-4), path


def test_layers_and_ties() -> None:
    model = build_gpt2_model(**SIZES)
    assert list(model.layers) == ["wte", "wpe", "h.0", "h.1", "h.2", "ln_f", "head"]
    assert model.ties == {"head.weight": "wte.weight"} and "head.weight" not in flatten(model.init())
    assert sum(leaf.numel() for leaf in flatten(build_gpt2_model().init(device="meta")).values()) == 124_439_808


@pytest.mark.parametrize("rate", ["embd_pdrop", "attn_pdrop", "resid_pdrop"])
def test_each_dropout_works_with_a_key_only(rate: str) -> None:
    model, plain = build_gpt2_model(**SIZES, **{rate: 0.5}), build_gpt2_model(**SIZES)
    params, batch = plain.init(), {"input_ids": torch.randint(0, 61, (2, 8))}
    assert torch.equal(model(params, batch), plain(params, batch))
    dropped = model(params, {**batch, "key": (0, 1)})
    assert not torch.allclose(dropped, plain(params, batch))
    assert torch.equal(dropped, model(params, {**batch, "key": (0, 1)}))
    assert torch.isfinite(dropped).all()


def test_attention_with_dropout_is_the_same_attention() -> None:
    """A rate too small to drop anything: the path that is written out must agree with the fused one."""
    model, plain = build_gpt2_model(**SIZES, attn_pdrop=1e-9), build_gpt2_model(**SIZES)
    params, batch = plain.init(), {"input_ids": torch.randint(0, 61, (2, 8))}
    assert torch.allclose(model(params, {**batch, "key": (0, 1)}), plain(params, batch), atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_head": 5}, "n_embd=32 is not divisible by n_head=5"),
        ({"n_layer": 0}, "n_layer=0, expected at least 1"),
        ({"n_head": 0}, "n_head=0, expected"),
        ({"attn_pdrop": 1.5}, "attn_pdrop=1.5 is not a probability"),
    ],
)
def test_invalid_sizes_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_gpt2_model(**{**SIZES, **sizes})


def test_a_sequence_that_is_too_long() -> None:
    model = build_gpt2_model(**SIZES)
    with pytest.raises(ModelError, match="a sequence of 25 tokens is longer than n_positions=24"):
        model(model.init(), {"input_ids": torch.zeros(1, 25, dtype=torch.int64)})


def test_invalid_state_dicts_are_refused(theirs: GPT2LMHeadModel) -> None:
    config, state = build_gpt2_model(**SIZES).config, theirs.state_dict()
    with pytest.raises(ModelError, match=r"has no 'ln_f.bias'"):
        from_hf({name: leaf for name, leaf in state.items() if name != "transformer.ln_f.bias"}, config)
    with pytest.raises(ModelError, match="'extra', which this model does not know"):
        from_hf({**state, "extra": torch.zeros(1)}, config)
    with pytest.raises(ModelError, match=r"lm_head.weight differs from wte.weight"):
        from_hf({**state, "lm_head.weight": state["lm_head.weight"] + 1}, config)

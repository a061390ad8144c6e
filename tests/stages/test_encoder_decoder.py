"""Values that cross, ties and masks; tests/stages/test_huggingface.py compares the rest with transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from autofunc.errors import ModelError
from autofunc.tree import flatten
from stages.encoder_decoder import build_encoder_decoder_model, config_from_hf
from stages.relative_positions import bucket
from tests.stages.families import FAMILIES, T5_SIZES

BATCH = FAMILIES["t5 v1.0"].batch(3)


def test_only_what_is_needed_crosses() -> None:
    model = build_encoder_decoder_model(**T5_SIZES)
    flat = flatten(model.init(seed=1))
    by_layer = model.layer_trees({path: model.lookup(flat, path) for path in model.spec})
    x, crossing = None, {}
    for name in model.layers:
        x = model.layers[name].apply(by_layer[name], x, BATCH)
        crossing[name] = {part: tuple(leaf.shape) for part, leaf in x.items()} if isinstance(x, dict) else tuple(x.shape)
    both = {"hidden": (3, 7, 16), "encoder_hidden": (3, 12, 16)}
    assert crossing == {
        "shared": (3, 12, 16),
        "encoder.block.0": (3, 12, 16),
        "encoder.block.1": (3, 12, 16),
        "encoder.final_layer_norm": (3, 12, 16),
        "decoder.embed_tokens": both,
        "decoder.block.0": both,
        "decoder.block.1": both,
        "decoder.block.2": (3, 7, 16),
        "decoder.final_layer_norm": (3, 7, 16),
        "lm_head": (3, 7, 19),
    }


def test_ties() -> None:
    model = build_encoder_decoder_model(**T5_SIZES)
    positions = "{}.layer.0.SelfAttention.relative_attention_bias.weight"
    assert model.ties == {
        "decoder.embed_tokens.weight": "shared.weight",
        "lm_head.weight": "shared.weight",
        positions.format("encoder.block.1"): positions.format("encoder.block.0"),
        positions.format("decoder.block.1"): positions.format("decoder.block.0"),
        positions.format("decoder.block.2"): positions.format("decoder.block.0"),
    }
    own = build_encoder_decoder_model(**T5_SIZES, tie_word_embeddings=False)
    assert "lm_head.weight" not in own.ties and "lm_head.weight" in flatten(own.init(device="meta"))


@pytest.mark.parametrize("both_ways", [True, False])
def test_buckets_equal_transformers(both_ways: bool) -> None:
    distance = torch.arange(-300, 301)
    expected = T5Attention._relative_position_bucket(distance, both_ways, num_buckets=32, max_distance=128)
    found = bucket(distance, 32, 128, both_ways)
    assert torch.equal(found, expected) and found.dtype == torch.int64


def test_padding_and_later_tokens_are_hidden() -> None:
    model = build_encoder_decoder_model(**T5_SIZES)
    params = model.init(seed=1)
    logits = model(params, BATCH)
    hidden = {**BATCH, "input_ids": torch.where(BATCH["attention_mask"] == 0, 1, BATCH["input_ids"])}
    assert torch.equal(model(params, hidden), logits), "padding"
    last = torch.tensor([12])
    assert not torch.equal(model(params, {**BATCH, "input_ids": BATCH["input_ids"].index_fill(1, last - 5, 0)}), logits)
    later = {**BATCH, "decoder_input_ids": BATCH["decoder_input_ids"].index_fill(1, torch.tensor([4]), 0)}
    changed = (model(params, later) - logits).abs().amax((0, 2)) > 0
    assert changed.nonzero().flatten().tolist() == [4, 5, 6]


def test_without_a_mask_there_is_no_padding() -> None:
    model = build_encoder_decoder_model(**T5_SIZES)
    params = model.init(seed=1)
    without = {name: leaf for name, leaf in BATCH.items() if name != "attention_mask"}
    assert torch.equal(model(params, without), model(params, {**BATCH, "attention_mask": torch.ones(3, 12)}))


def test_dropout_works_with_a_key_only() -> None:
    model, plain = build_encoder_decoder_model(**T5_SIZES, dropout_rate=0.5), build_encoder_decoder_model(**T5_SIZES)
    params = plain.init(seed=1)
    assert torch.equal(model(params, BATCH), plain(params, BATCH))
    dropped = model(params, {**BATCH, "key": (0, 1)})
    assert not torch.allclose(dropped, plain(params, BATCH)) and torch.isfinite(dropped).all()
    assert torch.equal(dropped, model(params, {**BATCH, "key": (0, 1)}))


def test_every_dropout_has_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    def record(x: torch.Tensor, p: float, batch: Any, name: str) -> torch.Tensor:
        names.append(name)
        return x

    monkeypatch.setattr("autofunc.random.dropout", record)
    model = build_encoder_decoder_model(**T5_SIZES, dropout_rate=0.5)
    model(model.init(), BATCH)
    assert len(names) == len(set(names)) == 4 + 2 * 4 + 3 * 6


def test_a_head_with_unscaled_features_is_untied() -> None:
    def tied(**settings: Any) -> bool:
        return config_from_hf({"model_type": "t5", **T5_SIZES, **settings}).tie_word_embeddings

    assert tied() and tied(tie_word_embeddings=True) and not tied(tie_word_embeddings=False)
    assert not tied(tie_word_embeddings=True, scale_decoder_outputs=False), "as transformers 5 writes T5 v1.1"


def test_invalid_settings_are_refused() -> None:
    with pytest.raises(ModelError, match=r"dropout_rate=1.0 is not a probability in \[0, 1\)"):
        build_encoder_decoder_model(**T5_SIZES, dropout_rate=1.0)
    with pytest.raises(ModelError, match="feed_forward_proj='gelu' is not supported; did you mean relu or gated-gelu"):
        build_encoder_decoder_model(**T5_SIZES, feed_forward_proj="gelu")
    with pytest.raises(ModelError, match="decoder_layers=0, expected at least 1"):
        build_encoder_decoder_model(**{**T5_SIZES, "num_decoder_layers": 0})

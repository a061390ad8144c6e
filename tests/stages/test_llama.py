"""The effects of Llama's settings; tests/stages/test_huggingface.py compares the rest with transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autofunc.errors import ModelError
from autofunc.tree import flatten
from stages.llama import build_llama_model, config_from_hf
from stages.rotary import rotary
from tests.stages.families import LLAMA3, SIZES

BATCH = {"input_ids": torch.arange(12)[None] % 19}


def test_a_window_that_covers_the_sequence_has_no_effect() -> None:
    plain = build_llama_model(**SIZES)
    params = plain.init(seed=1)
    expected = plain(params, BATCH)
    assert torch.equal(build_llama_model(**SIZES, sliding_window=12)(params, BATCH), expected)
    assert not torch.allclose(build_llama_model(**SIZES, sliding_window=11)(params, BATCH)[:, -1], expected[:, -1])


def test_a_window_hides_earlier_tokens() -> None:
    model = build_llama_model(**{**SIZES, "num_hidden_layers": 1}, sliding_window=4)
    params = model.init(seed=1)
    logits = model(params, BATCH)
    changed = model(params, {"input_ids": BATCH["input_ids"].clone().index_fill_(1, torch.tensor([5]), 0)})
    moved = (logits - changed).abs().amax((0, 2)) > 0
    assert moved.nonzero().flatten().tolist() == [5, 6, 7, 8]


def test_windows_of_qwen3() -> None:
    given = {"model_type": "qwen3", **SIZES, "sliding_window": 4, "max_window_layers": 0}
    assert config_from_hf(given).sliding_window is None
    assert config_from_hf({**given, "use_sliding_window": True}).sliding_window == 4
    assert config_from_hf({**given, "use_sliding_window": True, "max_window_layers": 28}).sliding_window is None


def test_llama3_leaves_short_wavelengths_and_divides_long_ones() -> None:
    """One frequency at a time, in plain numbers."""
    _, sin = rotary(torch.arange(2), 16, 500.0, LLAMA3)
    for index, found in enumerate(sin[1, :8].asin().tolist()):
        frequency = 500.0 ** (-index / 8)
        turns = 32 * frequency / 6.283185307179586  # in the original context
        part = min(max((turns - 1.0) / (4.0 - 1.0), 0.0), 1.0)
        assert found == pytest.approx(frequency * (part + (1 - part) / 8), rel=1e-3)


def test_parameters_of_each_kind() -> None:
    def inside(**settings: Any) -> set[str]:
        paths = flatten(build_llama_model(**SIZES, **settings).init(device="meta"))
        return {path.removeprefix("layers.0.self_attn.") for path in paths if path.startswith("layers.0.self_attn.")}

    plain = inside()
    assert plain == {f"{part}_proj.weight" for part in "qkvo"}
    assert inside(attention_bias=True) - plain == {f"{part}_proj.bias" for part in "qkvo"}
    assert inside(use_qk_norm=True) - plain == {"q_norm.weight", "k_norm.weight"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_hidden_layers": 0}, "llama: num_hidden_layers=0, expected at least 1"),
        ({"num_attention_heads": 3}, "hidden_size=16 is not divisible by num_attention_heads=3"),
        ({"head_dim": 5}, "a head of 5 features; rotary positions need an even number"),
        ({"rope_scaling": {"rope_type": "llama"}}, "'llama' is not supported; did you mean llama3"),
        ({"rope_scaling": {**LLAMA3, "factor": 0}}, "'llama3' has factor=0; expected a number > 0"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_llama_model(**{**SIZES, **settings})

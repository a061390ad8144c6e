"""Models of `stages/` with their own caches, and any causal module without one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autofunc as af
from autofunc.errors import ModelError
from stages.gpt2 import build_gpt2_model
from stages.llama import build_llama_model

ROWS, NEW = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5]], 9
GPT2 = {"vocab_size": 31, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.6}
LLAMA = {
    "vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.6,
}  # fmt: skip


def one_by_one(logits_of: Any, rows: list[list[int]] = ROWS) -> list[list[int]]:
    """Each text by itself, computed anew for each token."""
    found = []
    for row in rows:
        text = list(row)
        for _ in range(NEW):
            text.append(int(logits_of(torch.tensor([text]))[0, -1].argmax()))
        found.append(text[len(row) :])
    return found


def pipe_of(model: af.Model, num_ranks: int, engine: str = "graph", loss: Any = af.losses.causal_lm) -> af.Pipeline:
    schedule = af.schedule.build("gpipe", num_ranks=num_ranks, num_microbatches=2)
    return af.pipeline(af.split(model, num_ranks), schedule, loss=loss, engine=engine)


@pytest.mark.parametrize(
    "model",
    [
        build_gpt2_model(**GPT2, embd_pdrop=0.1, attn_pdrop=0.1),
        build_llama_model(**LLAMA, use_qk_norm=True),
        build_llama_model(**LLAMA, sliding_window=4, tie_word_embeddings=True),
    ],
)
def test_models_of_stages(model: af.Model) -> None:
    expected = one_by_one(lambda ids: model(model.init(seed=1), {"input_ids": ids}))
    assert len({tuple(text) for text in expected}) == 3 and len(set(expected[0])) > 3, "the texts tell"
    others = ((1, "graph"), (2, "eager")) if model.config.vocab_size == 31 else ()
    for num_ranks, engine in ((2, "graph"), *others):
        pipe = pipe_of(model, num_ranks, engine)
        params = pipe.init(seed=1)
        before = {path: leaf.clone() for path, leaf in af.tree.flatten(params).items()}
        assert af.generate(pipe, params, ROWS, max_new_tokens=NEW) == expected
        assert all(torch.equal(leaf, before[path]) for path, leaf in af.tree.flatten(params).items())


def test_adapters() -> None:
    base = build_gpt2_model(**GPT2)
    model = af.lora(base, ["*.attn.[qv].weight"], rank=2)
    params = model.init(seed=1)
    changed = {path: leaf + path.count("lora") * 0.5 for path, leaf in af.tree.flatten(params).items()}
    expected = one_by_one(lambda ids: model(changed, {"input_ids": ids}))
    assert expected != one_by_one(lambda ids: base(base.init(seed=1), {"input_ids": ids}))
    pipe = pipe_of(model, 2)
    assert af.generate(pipe, pipe.place(changed), ROWS, max_new_tokens=NEW) == expected


def test_the_page_runs_as_printed() -> None:
    page = Path(__file__).parents[2] / "docs" / "generation.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "generation.md", "exec"), names)
    assert [len(text) for text in names["drawn"]] == [8, 8]


class Own(nn.Module):
    """Sums of what came before; its argument has a name of its own."""

    def __init__(self, looks_ahead: bool = False) -> None:
        super().__init__()
        self.looks_ahead = looks_ahead
        self.table = nn.Embedding(30, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.head = nn.Linear(16, 30)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        x = self.table(tokens)
        for block in self.blocks:
            x = x + torch.tanh(block(x.cumsum(1)))
        if self.looks_ahead:
            x = x + x.mean(1, keepdim=True)
        return {"logits": self.head(x)}


def test_a_module_without_a_cache() -> None:
    """Every token takes a forward pass over the whole text, and a warning reports it."""
    torch.manual_seed(0)
    module = Own()
    expected = one_by_one(lambda ids: module(ids)["logits"])
    model = af.from_module(module, {"tokens": torch.zeros(2, 6, dtype=torch.long)})
    for num_ranks in (1, 2):
        pipe = pipe_of(model, num_ranks)
        with pytest.warns(
            UserWarning, match="without a cache: Own is not a transformers model. Every token takes a forward pass"
        ):
            assert af.generate(pipe, pipe.init(), ROWS, max_new_tokens=NEW) == expected
    told: list[str] = []
    assert af.generate(pipe, pipe.init(), ROWS[:1], max_new_tokens=NEW, tell=told.append) == expected[:1] and len(told) == 1


def test_a_module_that_looks_ahead() -> None:
    model = af.from_module(Own(looks_ahead=True), {"tokens": torch.zeros(2, 6, dtype=torch.long)})
    pipe = pipe_of(model, 2)
    with pytest.raises(ModelError, match=r"Own returns logits .* depend on later tokens"):
        af.generate(pipe, pipe.init(), ROWS, max_new_tokens=2, tell=lambda _: None)

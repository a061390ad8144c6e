"""Sizes, tables and operators that do not fit a mesh: each is one sentence, from Python too, before any step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autofunc as af
from autofunc.errors import AutofuncError
from autofunc.train.axes import Axes
from autofunc.train.tensor_parallel_check import imagined
from stages.llama import build_llama_model
from stages.moe import build_moe_model
from tests.shard.spread_models import batch_of, model_of

SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 4,
}  # fmt: skip


class Convolved(nn.Module):
    """Mixes tokens by a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.conv, self.head = nn.Embedding(32, 16), nn.Conv1d(16, 16, 3, padding=1), nn.Linear(16, 32)

    def forward(self, input_ids: Tensor) -> Tensor:
        made: Tensor = self.head(self.conv(self.words(input_ids).transpose(1, 2)).transpose(1, 2))
        return made


def sorting_model() -> af.Model:
    """A layer that sorts along features that a table cuts, as DTensor cannot."""
    init = lambda key: {"weight": key.normal("weight", (16, 32))}  # noqa: E731
    embed = af.Layer(init, lambda p, x, batch: batch["input_ids"].unsqueeze(-1).float().expand(-1, -1, 16) @ p["weight"])
    layer = af.Layer(lambda key: {}, lambda p, x, batch: torch.searchsorted(x.detach(), x.detach()) * x)
    return af.Model({"one": embed, "two": layer}, tensor_parallel=af.TensorParallel({"one.weight": "shard(1)"}))


Case = tuple[str, dict[str, int], str, dict[str, Any], dict[str, Any], int, tuple[str, ...]]
CASES: list[Case] = [
    # layers that are functions, with a table
    (
        "heads", {"tp": 4}, "llama", {"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 24}, {}, 8,
        ("tp=4 does not divide num_attention_heads=6", "sizes that do: 1, 2, 3, 6"),
    ),
    ("kv heads", {"tp": 4}, "llama", {"num_key_value_heads": 2}, {}, 8, ("num_key_value_heads=2", "sizes that do: 1, 2")),
    ("vocabulary", {"tp": 4}, "llama", {"vocab_size": 34}, {}, 8, ("vocab_size=34", "sizes that do: 1, 2, 17, 34")),
    ("features", {"tp": 4}, "llama", {"intermediate_size": 26}, {}, 8, ("dim 1 of parameter", "(16, 26)", "1, 2, 13, 26")),
    ("tokens", {"tp": 4}, "llama", {}, {"sequence_parallel": True}, 6, ("6 tokens", "tp=4", "4 or 8")),
    ("tokens over cp", {"cp": 4}, "llama", {}, {}, 12, ("12 tokens", "cp=4", "8 equal chunks", "multiple of 8")),
    ("both", {"cp": 2, "tp": 2}, "llama", {}, {}, 6, ("6 tokens", "cp=2", "multiple of 4")),
    ("both cut tokens", {"cp": 2, "tp": 2}, "llama", {}, {"sequence_parallel": True}, 8, ("cp=2 and tp=2", "cp=1")),
    ("both, kv heads", {"cp": 2, "tp": 2}, "llama", {"num_key_value_heads": 1}, {}, 8, ("num_key_value_heads=1", "do: 1")),
    (
        "no match", {"tp": 4}, "llama", {}, {"tensor_parallel": {"*.fc": "shard(0)"}}, 8,
        ("'*.fc' matches no parameter", "*.up_proj.weight"),
    ),
    (
        "unknown word", {"tp": 4}, "llama", {}, {"tensor_parallel": {"*.q_proj.weight": "columnwise"}}, 8,
        ("'*.q_proj.weight'", "'columnwise'", "'replicate' or 'shard(0)'"),
    ),
    (
        "no such dim", {"tp": 4}, "llama", {}, {"tensor_parallel": {"norm.weight": "shard(1)"}}, 8,
        ("shard(1) for 'norm.weight'", "(16,)", "shard(0)"),
    ),
    ("derived", {"tp": 4}, "llama", {}, {"tensor_parallel": "derived"}, 8, ("'derived'", "captured module")),
    ("unknown table", {"tp": 4}, "llama", {}, {"tensor_parallel": "derivd"}, 8, ("'derivd'", "derived")),
    ("unknown method", {"cp": 4}, "llama", {}, {"context_parallel": "rign"}, 8, ("'rign'", "ring")),
    (
        "operator over tp", {"tp": 4}, "sorting", {}, {}, 8,
        ("stage 0", "aten.searchsorted", "test_wrong_sizes.py, line", "tp=1"),
    ),
    # captured modules
    (
        "captured heads", {"tp": 4}, "captured llama",
        {"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 24}, {}, 8,
        ("tp=4 does not divide 6", "q_proj", "sizes that do: 1, 2, 3, 6"),
    ),
    (
        "captured features", {"tp": 4}, "captured llama", {"intermediate_size": 26}, {}, 8,
        ("tp=4 does not divide dim 0 of parameter", "(26, 16)", "1, 2, 13, 26"),
    ),
    ("captured tokens", {"cp": 4}, "captured llama", {}, {}, 12, ("12 tokens", "cp=4", "multiple of 8")),
    ("operator", {"cp": 4}, "convolved", {}, {}, 8, ("'conv'", "aten.conv1d", "test_wrong_sizes.py, line", "use cp=1")),
    (
        "captured no match", {"tp": 4}, "captured llama", {}, {"tensor_parallel": {"*.q_prj": "colwise"}}, 8,
        ("'*.q_prj' matches no parameter", "did you mean *.q_proj.weight"),
    ),
    ("own", {"tp": 4}, "captured gpt2", {}, {"tensor_parallel": "own"}, 8, ("no tensor parallel plan", "derived")),
    ("nothing", {"tp": 4}, "captured llama", {}, {"tensor_parallel": {}}, 8, ("nothing in Llama", "can be cut", "tp=1")),
    # experts
    (
        "experts", {"dp_shard": 4}, "moe", {"num_local_experts": 6}, {"expert_parallel": 4}, 8,
        ("expert_parallel=4 does not divide the 6 experts", "1 and 2 do"),
    ),
    ("expert ranks", {"dp_shard": 4}, "moe", {}, {"expert_parallel": 3}, 8, ("dp_shard=4", "1, 2 and 4 do")),
    ("no experts", {"dp_shard": 4}, "llama", {}, {"expert_parallel": 2}, 8, ("no routed experts", "use 1")),
]  # fmt: skip


def model_for(name: str, changed: dict[str, Any]) -> af.Model:
    if name == "llama":
        return build_llama_model(**{**SIZES, **changed})
    if name == "moe":
        return build_moe_model(**{**SIZES, "num_local_experts": 4, **changed})
    if name == "sorting":
        return sorting_model()
    if name == "convolved":
        return af.from_module(Convolved(), {"input_ids": batch_of("gpt2")["input_ids"]})
    _, name = name.split()
    return af.from_module(model_of(name, **changed), batch_of(name), inputs=["input_ids"])


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_one_sentence_that_says_what_works(case: Case) -> None:
    """When the pipeline is built, on a mesh of processes that do not exist: no step could be taken."""
    _, axes, name, changed, sharding, tokens, parts = case
    ids = torch.arange(8 * tokens).view(8, tokens) % 32
    loss = (lambda outputs, batch: outputs.mean()) if name == "sorting" else af.losses.causal_lm
    s = af.schedule.build("1f1b", num_ranks=1, num_microbatches=2)
    with imagined(Axes(**axes)) as mesh, pytest.raises(AutofuncError) as error:
        stages = af.split(model_for(name, changed), 1)
        pipe = af.pipeline(stages, s, loss=loss, mesh=mesh, sharding=af.Sharding(**sharding))
        pipe.build({"input_ids": ids, "labels": ids})
    found = str(error.value)
    assert all(part in found for part in parts), found
    assert "\n" not in found and len(found) < 400, found

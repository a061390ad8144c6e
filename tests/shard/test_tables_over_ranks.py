"""Which parameters are cut, and errors for sizes and tables that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import autofunc as af
from autofunc.errors import MeshError, ModelError
from tests.shard.spread_models import batch_of, model_of
from tests.shard.test_one_graph_for_each_rank import check


def plan_of(name: str, size: int = 2, table: Any = None, **changed: Any) -> Any:
    model = af.from_module(model_of(name, **changed), batch_of(name))
    return model.over_ranks("tp", size, table, sequence=False)


@pytest.mark.parametrize(
    "name", ["llama", "phi3", *(pytest.param(name, marks=pytest.mark.full) for name in ("qwen3", "gemma3", "mixtral"))]
)
def test_a_derived_table_equals_the_handwritten_one(name: str) -> None:
    """Where transformers has one, and says that fused weights are gathered, those are cut in parts all the same."""
    assert plan_of(name, table="derived").cuts == plan_of(name, table="own").cuts


def test_fused_weights_are_cut_part_by_part() -> None:
    cuts = plan_of("phi3").cuts
    assert cuts["model.layers.0.self_attn.qkv_proj.weight"].parts == (16, 8, 8)
    assert cuts["model.layers.0.mlp.gate_up_proj.weight"].parts == (24, 24)
    cuts = plan_of("gpt2").cuts
    assert cuts["transformer.h.0.attn.c_attn.weight"].parts == (16, 16, 16)
    assert (cuts["transformer.h.1.attn.c_attn.weight"].dim, cuts["transformer.h.1.attn.c_attn.bias"].dim) == (1, 0)
    text = "\n".join(plan_of("gpt2").described())
    assert "transformer.h.*.attn.c_attn.weight: dim 1, in parts of 3 x 16 (2 parameters)" in text


def test_attention_of_torch_is_cut_by_heads() -> None:
    """One weight for queries, keys and values: of all three in an encoder, of queries and of both others in a decoder."""
    cuts = plan_of("torch").cuts
    for attention in ("encoder.0.self_attn", "decoder.1.self_attn", "decoder.0.multihead_attn"):
        for part, dim in (("in_proj_weight", 0), ("in_proj_bias", 0), ("out_proj.weight", 1)):
            cut = cuts[f"{attention}.{part}"]
            assert (cut.dim, cut.parts) == (dim, (16,) if dim else (16, 16, 16)), part
    assert cuts["decoder.0.linear1.weight"].dim == 0 and cuts["decoder.0.linear2.weight"].dim == 1
    cuts = plan_of("torch_attention").cuts
    assert {f"attention.{part}_proj_weight" for part in "qkv"} | {"attention.in_proj_bias"} <= cuts.keys()


@pytest.mark.parametrize(("rows", "changed"), [(4, {}), (1, {}), (4, {"batch_first": False})])
def test_heads_of_torch_that_do_not_divide(rows: int, changed: dict[str, Any]) -> None:
    batch = {name: leaf[:rows] for name, leaf in batch_of("torch").items()}
    model = af.from_module(model_of("torch", decodes=False, **changed), batch)
    message = "tp=8 does not divide 4, the number of heads.*'encoder.0.self_attn.in_proj_weight'.*: 1, 2, 4$"
    with pytest.raises(MeshError, match=message):
        model.over_ranks("tp", 8, None, sequence=False)


def test_a_norm_over_all_heads() -> None:
    """Its sum is a number for each token, so the heads are cut all the same, each rank with its part of the weight."""
    plan, *_ = check("olmoe", 2, "derived", num_hidden_layers=1)
    assert {f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkvo"} <= plan.cuts.keys()
    assert "model.layers.0.self_attn.q_norm.weight" in plan.terms
    assert {"up.weight", "up.bias", "down.weight"} <= plan_of("normed").cuts.keys()


def test_a_custom_table() -> None:
    words = {"*.q_proj": "colwise", "*.k_proj": "colwise", "*.v_proj": "colwise", "*.o_proj": "rowwise"}
    placed = {f"{pattern}.weight": "shard(1)" if word == "rowwise" else "shard(0)" for pattern, word in words.items()}
    assert check("llama", 2, words)[0].cuts == check("llama", 2, placed)[0].cuts
    assert len(plan_of("llama", table=words).cuts) == 8


def test_few_heads_of_keys_are_on_every_rank() -> None:
    for table in ("own", "derived"):
        plan, forward, backward = check("llama", 4, table)
        assert not any("k_proj" in name or "v_proj" in name for name in plan.cuts)
        assert "model.layers.0.self_attn.k_proj.weight" in plan.terms, "summed once a step"
        assert forward["all_reduce"] == 4 + 3 and backward["all_reduce"] == 4 + 1, "nothing for keys"
        assert any("its 2 heads do not divide by 4" in note for note in plan.notes) == (table == "own")


def test_a_vocabulary_that_does_not_divide_is_whole() -> None:
    for table in ("own", "derived"):
        plan = check("llama", 2, table, vocab_size=33)[0]
        assert "lm_head.weight" not in plan.cuts and any("2 does not divide 33" in note for note in plan.notes)


class _Sorted(nn.Module):
    """Sorts along what a product makes, which no rank can do with a part."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.last(self.first(x).sort(-1)[0])
        return made


def test_an_operator_without_a_rule_runs_on_whole_values() -> None:
    batch = {"x": torch.randn(4, 8)}
    model = af.from_module(_Sorted(), batch)
    assert "first.weight" not in model.over_ranks("tp", 2, None, sequence=False).cuts, "it begins no chain"
    plan = model.over_ranks("tp", 2, {"first": "colwise", "last": "rowwise"}, sequence=False)
    (note,) = plan.notes
    assert "aten.sort.default gathers its operands" in note and "test_tables_over_ranks.py" in note


@pytest.mark.parametrize(
    ("name", "size", "table", "changed", "message"),
    [
        (
            "llama",
            2,
            None,
            {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 12},
            "does not divide 3.*1, 3",
        ),
        ("llama", 2, "derived", {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 12}, "divide 3.*1, 3"),
        ("gpt2", 3, None, {}, "tp=3.*nothing in GPT2LMHeadModel can be cut|does not divide 4"),
        ("llama", 2, None, {"intermediate_size": 25}, "does not divide dim 0 of parameter.*gate_proj.*25"),
        ("llama", 2, {"*.fc.weight": "shard(0)"}, {}, "matches no parameter"),
        ("llama", 2, {"*.fc": "colwise"}, {}, "matches no parameter"),
        ("llama", 2, "ours", {}, "'ours'; "),
        ("gpt2", 2, "own", {}, "has no tensor parallel plan of its own"),
    ],
)
def test_invalid_tables_are_refused(name: str, size: int, table: Any, changed: dict[str, Any], message: str) -> None:
    with pytest.raises((MeshError, ModelError), match=message):
        plan_of(name, size, table, **changed)

"""P7: over which axes layers can be cut, and why not."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import autofunc as af
from autofunc.checks import Verdict
from autofunc.checks.axes import check_axes
from autofunc.checks.subject import Subject
from stages.moe import build_moe_model
from tests.shard.spread_models import batch_of, model_of


class Mixed(nn.Module):
    """A prime number of features, and a convolution over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 7)
        self.conv = nn.Conv1d(7, 7, 3, padding=1)
        self.head = nn.Linear(7, 9)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.head(x)


TOKENS = {"input_ids": torch.zeros(4, 8, dtype=torch.long)}


@cache
def subject_of(name: str) -> Subject:
    """Return a subject that is captured once."""
    if name == "moe":
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = build_moe_model(16, num_key_value_heads=2, num_local_experts=4, **sizes)
        return Subject(model, {**TOKENS, "labels": TOKENS["input_ids"]}, af.losses.causal_lm, None, None, None)
    module, batch = (Mixed(), TOKENS) if name == "mixed" else (model_of(name), batch_of(name))
    return Subject(module, batch, None, None, None, None)


def found_of(name: str, sharding: af.Sharding | None = None, **asked: int) -> dict[str, Verdict]:
    subject = subject_of(name)
    return {each.data["axis"]: each for each in check_axes(subject, asked, sharding or af.Sharding())}


def test_a_llama() -> None:
    found = found_of("llama")
    assert [each.status for each in found.values()] == ["pass", "pass", "skip"]
    assert found["tp"].data["sizes"] == [2, 4], "it has four heads"
    assert found["tp"].message == "tp: yes, at 2, 4, by LlamaForCausalLM's own plan"
    assert found["cp"].message.startswith("cp: yes, at 2")
    assert found["ep"].message == "ep: no: the model has no routed experts whose parameters are known"


def test_unrequested_axes_are_reported_but_do_not_fail() -> None:
    report = af.check(Mixed(), TOKENS)
    assert [each.status for each in report.of("P7")] == ["skip"] * 3
    tp, cp, _ = report.of("P7")
    assert "does not divide" in tp.message and "'conv' runs aten.conv1d" in cp.message
    assert "test_axes.py, line" in cp.message and "self.conv(x.transpose(1, 2))" in cp.message, "the user's line"


@pytest.mark.parametrize(
    ("asked", "said"),
    [({"tp": 2}, "nothing in Mixed can be cut"), ({"cp": 2}, "aten.conv1d"), ({"ep": 2}, "no routed experts")],
)
def test_requested_axes_fail(asked: dict[str, int], said: str) -> None:
    found = found_of("mixed", **asked)
    (axis,) = asked
    assert found[axis].status == "fail" and said in found[axis].message
    assert all(each.status == "skip" for other, each in found.items() if other != axis)


def test_sizes_that_do_not_fit() -> None:
    assert "sizes that do: 1, 2, 4" in found_of("llama", tp=8)["tp"].message
    assert "has 8 tokens, which cp=3 ranks cannot cut into 6" in found_of("llama", cp=3)["cp"].message
    named = found_of("llama", af.Sharding(tensor_parallel={"*.k_porj": "colwise"}), tp=2)["tp"]
    assert named.status == "fail" and "'*.k_porj' matches no parameter" in named.message


def test_experts() -> None:
    found = found_of("mixtral")
    assert found["ep"].data["sizes"] == [2, 4]
    assert found["cp"].data["sizes"] == [2]
    assert "does not divide the 4 experts" in found_of("mixtral", ep=3)["ep"].message
    assert "along with tp" in found_of("mixtral", ep=2, tp=2)["ep"].message


def test_a_model_of_functions() -> None:
    assert found_of("moe")["ep"].data["sizes"] == [2, 4]


def test_unknown_axis() -> None:
    with pytest.raises(af.AutofuncError, match="did you mean tp"):
        af.check(Mixed(), TOKENS, axes={"tpp": 2})

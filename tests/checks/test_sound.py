"""Sound modules pass without findings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import autofunc as af
from autofunc import checks
from autofunc.checks.run import UNFINISHED
from autofunc.losses import causal_lm
from tests.captured.laws import assert_unchanged, contents
from tests.captured.zoo import ZOO
from tests.checks.faults import Sound, Tokens, rows


def statuses(report: checks.Report) -> dict[str, str]:
    """Return the worst finding of each check."""
    order = ["skip", "pass", "warn", "fail"]
    return {each.code: max((other.status for other in report.of(each.code)), key=order.index) for each in report.verdicts}


@dataclass
class Output:
    loss: Tensor
    logits: Tensor


class Encoder(nn.Module):
    """Attention with dropout, a tied table, a buffer, a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True) for _ in range(2)])
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("places", torch.linspace(0, 1, 5)[:, None])
        self.config = {"width": 8}

    def forward(self, ids: Tensor, labels: Tensor) -> Output:
        x = functional.dropout(self.embed(ids) + self.places, 0.1, self.training)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        return Output(functional.cross_entropy(logits.mean(1), labels), logits)


IDS = torch.randint(0, 9, (4, 5), generator=torch.Generator().manual_seed(0))


def check(module: nn.Module, batch: Any, **options: Any) -> checks.Report:
    before = contents(module)
    report = af.check(module, batch, **options)
    assert_unchanged(before, module)
    assert not [each.message for each in report.verdicts if UNFINISHED in each.message]
    assert report.ok, str(report)
    return report


def test_plain() -> None:
    found = statuses(check(Sound(), {"x": rows(6)}))
    assert found == {code: "skip" if code == "C5" else "pass" for code in found}


@pytest.mark.parametrize("training", [True, False])
def test_with_dropout(training: bool) -> None:
    report = check(Encoder().train(training), {"ids": IDS, "labels": IDS[:, 0]}, registry=True)
    found = statuses(report)
    assert set(found.values()) == {"pass"}
    assert [each.data["sizes"] for each in report.of("P7")] == [[2], [], []], "tp, cp, ep: 5 tokens, and no experts"
    assert report.of("P2")[0].data == {"ties": [["embed.weight", "head.weight"]]}


def test_statistics() -> None:
    class Normalised(Sound):
        def build(self) -> None:
            self.norm = nn.BatchNorm1d(6)

        def hidden(self, x: Tensor) -> Tensor:
            return self.norm(super().hidden(x))

    assert set(statuses(check(Normalised().eval(), {"x": rows(6)})).values()) == {"pass", "skip"}
    report = check(Normalised(), {"x": rows(6)})
    assert "norm.num_batches_tracked, norm.running_mean, norm.running_var" in report.of("C4")[0].message
    found = statuses(report)
    assert found.pop("P3") == "warn" and set(found.values()) == {"pass", "skip"}  # each microbatch by itself


def test_state() -> None:
    class Counts(Sound):
        def build(self) -> None:
            self.register_buffer("steps", torch.zeros(()))
            self.register_buffer("mean", torch.zeros(6))

        def hidden(self, x: Tensor) -> Tensor:
            self.steps += 1
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            return super().hidden(x)

    report = check(Counts(), {"x": rows(6)})
    assert set(statuses(report).values()) == {"pass", "skip"}
    assert "keeps state, which steps take and return (has_state=True): mean, steps" in report.of("C4")[0].message


def test_recurrent() -> None:
    class Recurrent(Sound):
        def build(self) -> None:
            self.lstm = nn.LSTM(6, 6, 2, dropout=0.5, batch_first=True)

        def forward(self, x: Tensor) -> Any:
            h, (last, _) = self.lstm(self.hidden(x))
            return {"loss": h.square().mean(), "h": h, "last": last}

    found = statuses(check(Recurrent(), {"x": rows(5, 6)}))
    assert found["P1"] == found["P3"] == found["P6"] == "pass"


def test_a_loss_with_weights() -> None:
    class Logits(Tokens):
        def forward(self, x: Tensor) -> Any:
            return self.hidden(x)

    labels = IDS.clamp_max(5)
    labels[0, 2:] = -100
    report = check(Logits(), {"x": rows(5, 6), "labels": labels}, loss=causal_lm, inputs=["x"])
    assert statuses(report)["C3"] == "pass"
    assert report.of("C3")[0].message.startswith("the given loss")


def test_three_rows_and_one() -> None:
    assert statuses(check(Sound(), {"x": rows(6)[:3]}))["P3"] == "pass"
    assert statuses(check(Sound(), {"x": rows(6)[:1]}))["P3"] == "skip"


def test_split_points() -> None:
    [verdict] = check(Sound(), {"x": rows(6)}).of("P1")
    assert verdict.data["split_points"] == [{"names": ["blocks.1"], "layer": True, "values": 1, "bytes": 4 * 6 * 4}]


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_transformers_models(name: str) -> None:
    build, batch = ZOO[name]
    report = check(build(), batch())
    assert statuses(report)["P3"] == "pass" and statuses(report)["C4"] == "pass"
    [cuts] = report.of("P1")
    points = {point["names"][0]: point for point in cuts.data["split_points"]}
    if name == "gpt2":
        assert points["transformer.h.2"] == {
            "names": points["transformer.h.2"]["names"], "layer": True, "values": 1, "bytes": 4 * 12 * 32 * 4,
        }  # fmt: skip
    assert ("shifts" in report.of("C3")[0].message) == (name == "gpt2")


def test_class_tokens_and_custom_norms() -> None:
    """Modules that read their own parameters cause no warning; nor do attributes that a capture restores."""
    build, batch = ZOO["vit"]
    assert not [each for each in check(build(), batch()).verdicts if each.status == "warn"]


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in ZOO if name not in ("gpt2", "t5")])
def test_more_transformers_models(name: str) -> None:
    build, batch = ZOO[name]
    check(build(), batch())


def test_a_model() -> None:
    def first(params: Any, x: Any, batch: Any) -> Tensor:
        return batch["x"] @ params["weight"]

    def second(params: Any, x: Tensor, batch: Any) -> Tensor:
        return (x @ params["weight"]).square().mean()

    def init(key: Any) -> dict[str, Tensor]:
        return {"weight": key.normal("weight", (6, 6))}

    model = af.Model({"a": af.Layer(init, first), "b": af.Layer(init, second)})
    report = af.check(model, {"x": rows(6)})
    assert report.ok, str(report)
    expected = {"C1": "skip", "C2": "skip", "C3": "pass", "C4": "skip", "C5": "skip"}
    assert statuses(report) == {**expected, **{f"P{number}": "pass" for number in range(1, 6)}, "P6": "skip", "P7": "skip"}
    captured = af.check(af.from_module(Sound(), {"x": rows(6)}), {"x": rows(6)})
    assert captured.ok and captured.of("P1")[0].data["split_points"][0]["names"] == ["blocks.1"]

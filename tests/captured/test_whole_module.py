"""`from_module(verify=True)` and the same check in `af.check`: a module that keeps the law passes, a breach is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import autofunc as af
from autofunc import cache, whole_module
from autofunc.engine import layouts
from autofunc.errors import ModelError
from autofunc.whole_module import differences


class Forecaster(nn.Module):
    """Its norm's backward gets a gradient with other strides than fake tensors promised."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(8, 8, 1), nn.GroupNorm(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.dropout(torch.tanh(self.first(x)), 0.5, self.training)
        return self.norm(self.second(x)).transpose(1, 2)  # type: ignore[no-any-return]


def loss(outputs: Tensor, microbatch: Mapping[str, Any]) -> Tensor:
    return functional.mse_loss(outputs, microbatch["target"])


BATCH = {"x": torch.randn(4, 3, 12), "target": torch.randn(4, 12, 8)}


def test_results_are_the_modules_own() -> None:
    model = af.from_module(Forecaster(), BATCH, inputs=["x"], verify=True)
    assert differences(model, BATCH, loss) == []
    report = af.check(Forecaster(), BATCH, loss=loss, inputs=["x"])
    assert next(verdict for verdict in report.verdicts if verdict.code == "P6").status == "pass"


def test_a_breach_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the copy that the norm's backward needs, the gradients before it are wrong, and nothing else notices."""
    monkeypatch.setattr(layouts, "_reads_any_strides", lambda node: True)
    monkeypatch.setattr(cache, "shared", cache.Cache(1024))
    found = differences(af.from_module(Forecaster(), BATCH, inputs=["x"]), BATCH, loss)
    assert found and all(text.startswith("the gradient of '") for text in found)
    report = af.check(Forecaster(), BATCH, loss=loss, inputs=["x"])
    (verdict,) = (verdict for verdict in report.verdicts if verdict.code == "P6")
    assert verdict.status == "fail" and "the gradient of 'first.weight' is off by" in verdict.message


def test_a_breach_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_module, "differences", lambda model, batch: ["the gradient of 'a' is off"])
    with pytest.raises(ModelError, match="Forecaster changed when captured: the gradient of 'a' is off"):
        af.from_module(Forecaster(), BATCH, inputs=["x"], verify=True)


def test_without_weights() -> None:
    with torch.device("meta"):
        module = Forecaster()
    with pytest.raises(ModelError, match=r"'first\.weight' is on the meta device"):
        af.from_module(module, BATCH, inputs=["x"], verify=True)

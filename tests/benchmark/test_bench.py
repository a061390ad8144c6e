"""A benchmark from end to end in this process: contenders are checked, measured and shown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import autofunc as af
from autofunc.benchmark import Results
from autofunc.benchmark.autofunc_runner import AutofuncRunner
from autofunc.benchmark.contender import AUTOFUNC, TORCH
from autofunc.benchmark.peak import peak_bytes
from tests.cases import make_case


@pytest.fixture(scope="module")
def of_gpt2() -> Results:
    """Tied weights, dropout, and ignored labels."""
    model, _, loss, batch = make_case("gpt2", 2, 8)
    return af.bench(
        model, batch, loss=loss, schedules=["gpipe", "zb_h1"], microbatches=[4], engines=["graph", "eager"],
        against=["torch", "plain"], key=(0, 1), repetitions=2, split_points=["h.2"], progress=False,
    )  # fmt: skip


def test_all_are_measured_in_the_same_rounds(of_gpt2: Results) -> None:
    names = [each.name for each in of_gpt2.measured]
    assert (
        names[:3] == ["autofunc gpipe graph", "torch LoopedBFS eager", "autofunc gpipe eager"] and names[-1] == "plain loop"
    )
    assert len(names) == 4 + 1 + 1 and all(len(each.step_ms) == 2 for each in of_gpt2.measured)
    assert [each.name for each in of_gpt2.left_out] == ["torch zb_h1"]
    assert of_gpt2.unit == "tokens" and of_gpt2.setting["tokens"] == 8 * 6
    first = of_gpt2.measured[0]
    assert first.units_per_second == pytest.approx(8 * 6 / (first.ms.median / 1e3))
    assert not dist.is_initialized(), "the group that torch asks for is gone"


def test_gradients_match_the_plain_loop(of_gpt2: Results) -> None:
    for each in of_gpt2.measured:
        exact = each.contender.side != TORCH  # whose shares of the mean are divided before they are summed
        assert each.gradient_error is not None and each.gradient_error <= (0.0 if exact else 1e-5), each.name


def test_memory_is_measured_and_predicted(of_gpt2: Results) -> None:
    for each in of_gpt2.measured:
        (peak,) = each.peak_bytes
        assert peak > 0
        if each.contender.side == AUTOFUNC and each.contender.engine == "graph":
            assert each.live_bytes == each.predicted_bytes is not None
            assert peak >= sum(each.live_bytes) / 2, "ranks of one process are not at their peaks together"
        else:
            assert each.live_bytes is each.predicted_bytes is None


def test_bubbles_are_simulated_if_ranks_take_turns(of_gpt2: Results) -> None:
    gpipe, zb = of_gpt2["autofunc gpipe graph"], of_gpt2["autofunc zb_h1 graph"]
    assert gpipe.bubble is None and gpipe.schedule_bubble is not None and 0 < gpipe.schedule_bubble < 1
    assert zb.timeline is not None and zb.timeline.schedule.name == "zb_h1" and "simulated" in zb.timeline.label
    theirs = of_gpt2["torch LoopedBFS eager"]
    assert theirs.schedule_bubble is None and theirs.timeline is not None
    assert len(theirs.timeline.schedule[0]) == 2 * 2 * 4, "F and B of two stages"


def test_wrong_gradients_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = AutofuncRunner.grads
    monkeypatch.setattr(
        AutofuncRunner, "grads", lambda self: {path: 1.01 * grad for path, grad in right(self).items()}
    )  # fmt: skip
    model, _, loss, batch = make_case("mlp", 2, 4)
    found = af.bench(
        model, batch, loss=loss, schedules=["1f1b"], microbatches=[2], against=["plain"], repetitions=1, progress=False
    )  # fmt: skip
    assert [each.name for each in found.measured] == ["plain loop"] and found.unit == "rows"
    (left,) = found.left_out
    assert left.wrong and "differ from the plain loop's by 1.0e-02" in left.why


class TwoWays(nn.Module):
    """Passes on numbers, ints and a value without gradient, which the last layer uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Mapping[str, Tensor]:
        h = self.first(x)
        order = h.detach().argsort(-1)
        frozen = h.detach().exp()
        h = self.second(h).relu()
        h = self.head(h.gather(-1, order) + frozen)
        return {"loss": (h - y).square().mean()}


def test_torch_gets_values_of_all_kinds() -> None:
    generator = torch.Generator().manual_seed(0)
    batch = {"x": torch.randn(6, 4, generator=generator), "y": torch.randn(6, 3, generator=generator)}
    model = af.from_module(TwoWays(), {name: leaf[:2] for name, leaf in batch.items()})
    found = af.bench(
        model, batch, schedules=["1f1b"], microbatches=[3], split_points=["second"], against=["torch"], repetitions=1,
        progress=False,
    )  # fmt: skip
    assert [each.contender.side for each in found.measured] == [AUTOFUNC, TORCH], found.left_out


def test_contenders_torch_cannot_run_are_left_out() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Mapping[str, Tensor]:
            return {"loss": self.b(self.norm(self.a(x)).relu()).mean()}

    batch = {"x": torch.randn(8, 4, generator=torch.Generator().manual_seed(1))}
    model = af.from_module(Norm(), {"x": batch["x"][:2]})
    given: dict[str, Any] = {"schedules": ["1f1b"], "microbatches": [2], "against": ["torch"], "repetitions": 1}
    found = af.bench(model, batch, progress=False, **given)
    assert [each.contender.side for each in found.measured] == [AUTOFUNC]
    assert ["keeps state" in each.why for each in found.left_out] == [True]


def test_nothing_to_measure() -> None:
    model, _, loss, batch = make_case("mlp", 2, 4)
    with pytest.raises(af.AutofuncError, match=r"nothing to measure\. autofunc dualpipe_v"):
        af.bench(model, batch, loss=loss, schedules=["dualpipe_v"], microbatches=[1])
    with pytest.raises(af.AutofuncError, match="repetitions=0"):
        af.bench(model, batch, loss=loss, repetitions=0)


def test_the_guide_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "benchmarks.md", "exec"), {})
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"bench.json", "bench.png", "bench.html"}


def test_peak_counts_temporaries() -> None:
    x = torch.zeros(1000)

    def step() -> Tensor:
        a = x + 1  # 4,000 bytes
        b = a * a  # 8,000
        del a
        return b * b  # 8,000, as the first is gone

    step()
    assert peak_bytes(step, torch.device("cpu"), 0) == pytest.approx(8000, abs=200)


def test_mfu_if_the_peak_is_known() -> None:
    model, _, loss, batch = make_case("mlp", 2, 4)
    found = af.bench(
        model, batch, loss=loss, schedules=["1f1b"], microbatches=[2], repetitions=1, peak=1e9, check=False, progress=False
    )  # fmt: skip
    (each,) = found.measured
    operations = 3 * 2 * 4 * sum(leaf.numel() for leaf in model.spec.values() if leaf.dim() == 2)
    assert each.mfu == pytest.approx(operations / (each.ms.median / 1e3) / 1e9, rel=1e-6)
    assert each.gradient_error is None and replace(each, mfu=None).mfu is None

"""gelu in compiled pieces: no less exact than torch's kernel, and with the tanh it replaces on other devices only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table
from torch.nn import functional

from autofunc.engine.gelu import with_sigmoids
from autofunc.fake import fake_mode
from autofunc.graph.trace import trace

ATEN = torch.ops.aten
TABLE = with_sigmoids(select_decomp_table())
FORMS = [
    pytest.param(torch.float32, True, marks=pytest.mark.full),  # takes inductor some seconds
    (torch.float32, False), (torch.bfloat16, False),
]  # fmt: skip


def both(x: Tensor, g: Tensor, approximate: str = "tanh") -> list[Tensor]:
    return [ATEN.gelu(x, approximate=approximate), ATEN.gelu_backward(g, x, approximate=approximate)]


def traced(*given: Tensor, approximate: str = "tanh") -> fx.GraphModule:
    def call(x: Tensor, g: Tensor) -> list[Tensor]:
        return both(x, g, approximate)

    return trace(call, *given, decompositions=TABLE)


@pytest.mark.parametrize(("dtype", "compiles"), FORMS)
def test_as_exact_as_torch(dtype: torch.dtype, compiles: bool) -> None:
    """Against fp64: the largest error of values and slopes is at most that of torch's own kernel, or a few roundings."""
    x = torch.cat([torch.linspace(-12, 12, 20_001), torch.tensor([0.0, -0.0, 1e-20, -1e-20, 3e4, -3e4])]).to(dtype)
    g = torch.ones_like(x)
    call = torch.compile(traced(x, g)) if compiles else traced(x, g)
    found = call(x, g)
    for ours, theirs, exact in zip(found, both(x, g), both(x.double(), g.double()), strict=True):
        assert ours.dtype == dtype
        scale = exact.abs().clamp(min=1)
        error, allowed = (((each.double() - exact) / scale).abs().max() for each in (ours, theirs))
        assert error <= max(allowed, 4 * torch.finfo(dtype).eps)


def test_in_fp64() -> None:
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    g = torch.ones_like(x)
    for ours, theirs in zip(traced(x, g)(x, g), both(x, g), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-14)


def test_infinities_and_nan_as_in_torch() -> None:
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 3e38, -3e38])
    g = torch.ones_like(x)
    for ours, theirs in zip(traced(x, g)(x, g), both(x, g), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def operators(*given: Tensor, approximate: str) -> set[str]:
    return {str(node.target) for node in traced(*given, approximate=approximate).graph.nodes}


def test_elsewhere_inductors_own() -> None:
    on_cpu = [torch.empty(4), torch.empty(4)]
    assert "aten.tanh.default" not in operators(*on_cpu, approximate="tanh")
    assert "aten.erf.default" in operators(*on_cpu, approximate="none")
    with fake_mode(), torch.no_grad():
        on_gpu = operators(torch.empty(4, device="cuda"), torch.empty(4, device="cuda"), approximate="tanh")
    assert "aten.tanh.default" in on_gpu and "aten.sigmoid.default" not in on_gpu


@pytest.mark.full
def test_a_compiled_model_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a pipeline: the piece that inductor gets has no tanh."""
    import autofunc as af
    from autofunc.engine import compile as compile_module

    seen: set[str] = set()
    choose = compile_module.choose_matmuls

    def look(graph: fx.Graph) -> None:
        seen.update(str(node.target) for node in graph.nodes)
        choose(graph)

    monkeypatch.setattr(compile_module, "choose_matmuls", look)

    def apply(p: Any, x: Any, batch: Any) -> Tensor:
        return functional.gelu(batch["x"] * p["w"], approximate="tanh")

    layers = {"a": af.Layer(lambda key: {"w": key.normal("w", (5,))}, apply)}
    s = af.schedule.build("gpipe", num_ranks=1, num_microbatches=1)
    pipe = af.pipeline(af.split(af.Model(layers), 1), s, loss=lambda out, mb: out.sum(), compile=True)
    params, batch = pipe.init(3), {"x": torch.linspace(-3, 3, 10).view(2, 5)}
    loss, grads = af.value_and_grad(pipe)(params, batch)
    w = params["a", "w"].detach().requires_grad_()
    expected = functional.gelu(batch["x"] * w, approximate="tanh").sum()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grads["a", "w"], w.grad)
    assert "aten.sigmoid.default" in seen and "aten.tanh.default" not in seen

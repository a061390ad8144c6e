"""A step under different torch settings than the first behaves as plain torch does, not as it was captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import autofunc as af
from autofunc.surroundings import surroundings
from autofunc.tree import flatten


class Net(nn.Module):
    """Makes a tensor of the default dtype, and multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.b(torch.tanh(self.a(x))))
        return self.c(h * torch.full((8,), 1 / 3)[None].to(h.dtype))


def loss(outputs: Any, rows: Any) -> Any:
    return functional.cross_entropy(outputs.float(), rows["labels"], reduction="sum"), outputs.shape[0]


def example() -> tuple[Net, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return Net(), {"x": torch.randn(8, 6), "labels": torch.randint(0, 4, (8,))}


def pipeline(net: nn.Module, batch: Any, **options: Any) -> af.Pipeline:
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=2)
    return af.pipeline(af.split(af.from_module(net, batch), 2), s, loss=loss, **options)


def by_torch(net: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    net.zero_grad()
    for rows in ({name: leaf[part] for name, leaf in batch.items()} for part in (slice(0, 4), slice(4, 8))):
        (loss(net(rows["x"]), rows)[0] / 8).backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def assert_as_torch(grads: Any, net: nn.Module, batch: Any, within: float) -> None:
    expected, found = by_torch(net, batch), flatten(grads)
    largest = max(each.abs().max().item() for each in expected.values())
    assert largest > 0
    for name, each in expected.items():
        assert (found[name] - each).abs().max().item() <= within * largest, name


def low() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


@contextmanager
def default_fp64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("options", [{}, {"engine": "eager"}, {"engine": "eager", "remat": "stage"}, {"remat": "stage"}])
@pytest.mark.parametrize("first", [True, False])
def test_autocast_applies_per_step(options: dict[str, Any], first: bool) -> None:
    net, batch = example()
    pipe = pipeline(net, batch, **options)
    step, params = af.value_and_grad(pipe), pipe.init()
    full = by_torch(net, batch)
    for autocast in (first, not first, first):
        if autocast:
            with low():
                _, grads = step(params, batch)
                assert_as_torch(grads, net, batch, 2e-2)
            different = max((flatten(grads)[name] - each).abs().max().item() for name, each in full.items())
            assert different > 1e-5, "in fp32"
        else:
            assert_as_torch(step(params, batch)[1], net, batch, 1e-6)


@pytest.mark.parametrize("setting", [default_fp64, lambda: torch.autocast("cpu", dtype=torch.float16), low])
def test_settings_have_separate_plans(setting: Callable[[], AbstractContextManager[Any]]) -> None:
    net, batch = example()
    pipe = pipeline(net, batch)
    params = pipe.init()
    before, known = pipe(params, batch), surroundings()
    with setting():
        assert surroundings() != known
        with torch.no_grad():
            rows = [{name: leaf[part] for name, leaf in batch.items()} for part in (slice(0, 4), slice(4, 8))]
            expected = sum(loss(net(each["x"]), each)[0] for each in rows) / 8
        assert torch.allclose(pipe(params, batch).double(), expected.double(), atol=1e-7)
    assert torch.equal(pipe(params, batch), before)


@pytest.mark.parametrize("engine", ["graph", "eager"])
def test_inference_mode_around_a_step(engine: str) -> None:
    net, batch = example()
    pipe = pipeline(net, batch, engine=engine)
    step = af.value_and_grad(pipe)
    with torch.inference_mode():
        params = pipe.init()
        optimizer = af.optimizer(torch.optim.AdamW, lr=0.1)
        state = optimizer.init(params)
        value = pipe(params, batch)
        outputs = pipe.forward(params, batch)
        inside_loss, inside = step(params, batch)
    made = [value, outputs, *flatten(params).values(), *flatten(inside).values()]
    assert not any(each.is_inference() for each in made)
    outside_loss, outside = step(params, batch)
    assert torch.equal(inside_loss, outside_loss) and torch.equal(value, outside_loss)
    assert all(torch.equal(each, flatten(outside)[name]) for name, each in flatten(inside).items())
    assert_as_torch(outside, net, batch, 1e-6)
    with torch.inference_mode():
        params, state = optimizer.update(inside, state, params)
    optimizer.update(outside, state, params)


def test_causal_lm_keeps_fp64() -> None:
    logits, labels = torch.randn(2, 3, 5, dtype=torch.float64), torch.randint(0, 5, (2, 3))
    total, weight = af.losses.causal_lm(logits, {"labels": labels})
    expected = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert total.dtype == torch.float64 and torch.equal(total, expected) and weight == 6
    assert af.losses.causal_lm(logits.bfloat16(), {"labels": labels})[0].dtype == torch.float32

"""Outside values that change between steps: a step never uses the values that were captured first."""

from __future__ import annotations

import timeit
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autofunc as af
from autofunc.outside import Outside

COEFFICIENT = 1.0
TABLE = {"c": [1.0]}


class Settings:
    """A user's class, named by a function."""

    coefficient = 1.0


class Block(nn.Module):
    """Reads numbers in many places."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(4, 4), nn.Threshold(-100.0, 0.0)
        self._own, self.config = 1.0, types.SimpleNamespace(alpha=1.0)
        self.listed, self.unread = [1.0], 0

    @property
    def own(self) -> float:
        return self._own * COEFFICIENT

    def helped(self, x: Tensor) -> Tensor:
        return x * self.own * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.helped(self.drop(self.linear(x))) * self.config.alpha * self.listed[0]


def by_number(outputs: Any, rows: Any) -> Any:
    return (outputs**2).sum(), outputs.shape[0]


def pipeline(model: af.Model, loss: Any = by_number, engine: str = "graph") -> af.Pipeline:
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=2)
    return af.pipeline(af.split(model, 2), s, loss=loss, engine=engine)


def chain(factor: Callable[[], float]) -> af.Model:
    def apply(p: Any, x: Any, batch: Any) -> Any:
        return (batch["x"] if x is None else x) * p["w"] * factor()

    return af.Model({name: af.Layer(lambda key: {"w": key.ones("w", (4,))}, apply) for name in ("a", "b")})


def set_attribute(name: str) -> Callable[[Block, float], None]:
    return lambda block, value: setattr(block, name, value)


CHANGES: dict[str, Callable[[Block, float], Any]] = {
    "private attribute, by a property": set_attribute("_own"),
    "attribute of the class": lambda block, value: setattr(Block, "scale", value),
    "in a namespace": lambda block, value: setattr(block.config, "alpha", value),
    "in a list": lambda block, value: block.listed.__setitem__(0, value),
    "global of a property": lambda block, value: globals().__setitem__("COEFFICIENT", value),
    "of a part of torch": lambda block, value: setattr(block.drop, "threshold", -100.0 if value == 1.0 else 0.3),
}


@pytest.mark.parametrize("engine", ["graph", "eager"])
@pytest.mark.parametrize("what", CHANGES)
def test_values_forward_reads_count_at_every_step(what: str, engine: str) -> None:
    torch.manual_seed(0)
    block, batch = Block(), {"x": torch.randn(4, 4)}
    net = nn.Sequential(nn.Linear(4, 4), block)
    pipe = pipeline(af.from_module(net, {"input": batch["x"]}), engine=engine)
    params, found = pipe.init(), []
    for value in (1.0, 0.5, 1.0):
        CHANGES[what](block, value)
        total, grads = af.value_and_grad(pipe)(params, {"input": batch["x"]})
        net.zero_grad()
        expected = (net(batch["x"]) ** 2).sum() / 4
        expected.backward()
        assert torch.allclose(total, expected) and torch.allclose(grads["0", "weight"], net[0].weight.grad)
        found.append(total)
    assert not torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert len(pipe._plans) == 2, "the first is known"
    block.unread += 1
    af.value_and_grad(pipe)(params, {"input": batch["x"]})
    assert len(pipe._plans) == 2, "forward does not read it"


class Holder:
    """An object of the user's."""

    def __init__(self) -> None:
        self.value = 1.0


@pytest.mark.parametrize("where", ["loss", "layers"])
@pytest.mark.parametrize("what", ["closure", "global", "class", "object", "namespace", "nested"])
def test_values_functions_name_count_at_every_step(what: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    number, holder, space, table = 1.0, Holder(), types.SimpleNamespace(value=1.0), TABLE["c"]
    factors: dict[str, Callable[[], float]] = {
        "closure": lambda: number, "global": lambda: COEFFICIENT, "class": lambda: Settings.coefficient,
        "object": lambda: holder.value, "namespace": lambda: space.value, "nested": lambda: TABLE["c"][0],
    }  # fmt: skip
    factor = factors[what]

    def loss(outputs: Any, rows: Any) -> Any:
        return outputs.sum() * factor(), 1

    pipe = pipeline(chain(factor), by_number) if where == "layers" else pipeline(chain(lambda: 1.0), loss)
    params, batch = pipe.init(), {"x": torch.ones(4, 4)}
    step = af.value_and_grad(pipe)
    first, _ = step(params, batch)
    for value in (0.5, 1.0):
        number = holder.value = space.value = table[0] = value
        monkeypatch.setitem(globals(), "COEFFICIENT", value)
        monkeypatch.setattr(Settings, "coefficient", value)
        total, _ = step(params, batch)
        ratio = 0.0625 if where == "layers" else 0.5
        assert torch.equal(total, first * (ratio if value == 0.5 else 1.0))


def test_a_number_that_changes_all_the_time_belongs_in_the_batch() -> None:
    coefficient = 1.0

    def annealed(outputs: Any, rows: Any) -> Any:
        return outputs.sum() * coefficient, outputs.shape[0]

    pipe = pipeline(chain(lambda: 1.0), annealed)
    params, batch = pipe.init(), {"x": torch.ones(4, 4)}
    with pytest.warns(UserWarning, match=r"'coefficient' of annealed changed between steps.* put changing numbers into"):
        for number in range(6):
            coefficient = 1 / (1 + number)
            assert torch.allclose(pipe(params, batch), torch.tensor(4 * coefficient))

    given = pipeline(chain(lambda: 1.0), lambda outputs, rows: (outputs.sum() * rows["coefficient"], 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(6):
            total = given(params, {**batch, "coefficient": torch.tensor(1 / (1 + number))})
            assert torch.allclose(total, torch.tensor(2 / (1 + number)))
    assert len(given._plans) == 1


def test_checking_unchanged_values_is_cheap() -> None:
    numbers = [float(number) for number in range(100)]
    functions = [lambda number=number: number * COEFFICIENT * len(numbers) for number in numbers]
    outside = Outside(lambda: functions)
    key = outside.key()
    assert outside.key() is key
    assert min(timeit.repeat(outside.key, number=10, repeat=5)) / 10 < 2e-3


class Scaled(nn.Module):
    """Reads a buffer and a tensor that is a plain attribute, and writes to neither."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("factor", torch.tensor(2.0))
        self.plain = torch.tensor([3.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.second((self.first(x) * self.factor * self.plain).tanh()).square().mean()


@pytest.mark.parametrize("engine", ["graph", "eager"])
def test_buffers_and_tensors_that_are_written_to(engine: str) -> None:
    """They are written to outside of forward, which captures their values."""
    module, batch = Scaled(), {"x": torch.randn(4, 4)}
    pipe = pipeline(af.from_module(module, batch), None, engine)
    params, step = pipe.init(), af.value_and_grad(pipe)
    changes: list[Callable[[], Any]] = [
        lambda: None,
        lambda: module.factor.fill_(0.5),
        lambda: module.plain.mul_(0.1),
        lambda: setattr(module, "factor", torch.tensor(7.0)),
    ]
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for change in changes:
            change()
            seen.append(step(params, batch)[0].item())
            assert seen[-1] == pytest.approx(module(**batch).item(), rel=1e-6)
    assert len(set(seen)) == 4
    held = len(pipe._plans)
    module.factor.fill_(7.0)  # the same value
    step(params, batch)
    assert len(pipe._plans) == held

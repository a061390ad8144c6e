"""Keys of functions: equal for the same computation, and never for another."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from autofunc.fingerprint import Fingerprint, Name

SCALE = 2.0
TABLE = {"a": [1, 2], "b": (3.0,)}


def key(value: Any, name: str = "", label: str = "") -> Any:
    return Fingerprint(name, label).of(value)


def scaled(factor: Any, *, shift: Any = 0) -> Callable[[Any], Any]:
    def function(x: Any, times: Any = 1) -> Any:
        return (lambda y: y * factor + shift)(x) * times

    return function


def by_global(x: Any) -> Any:
    return [SCALE * each for each in (x,)]


def through_another(x: Any) -> Any:
    return by_global(x), TABLE


class Method:
    """Compared by identity, and by its attributes."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def apply(self, x: Any) -> Any:
        return self.factor * x


@dataclass
class Config:
    """Compared by value."""

    width: int
    names: tuple[str, ...] = ("a",)


same = torch.ones(2)
method = Method(2.0)


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (scaled(2), scaled(2), True),
        (scaled(2), scaled(3), False),
        (scaled(2), scaled(2.0), False),
        (scaled(1), scaled(True), False),
        (scaled(0.0), scaled(-0.0), False),
        (scaled(2), scaled(2, shift=1), False),
        (scaled("a"), scaled("a"), True),
        (scaled([1, {"b": 2}]), scaled([1, {"b": 2}]), True),
        (scaled([1, {"b": 2}]), scaled((1, {"b": 2})), False),
        (scaled({"a": 1, "b": 2}), scaled({"b": 2, "a": 1}), False),
        (scaled({1, 2}), scaled({2, 1}), True),
        (scaled(slice(1, 2)), scaled(slice(1, 2)), True),
        (scaled(slice(1, 2)), scaled(slice(1, 3)), False),
        (scaled(torch.Size([2])), scaled(torch.Size([2])), True),
        (scaled(torch.float32), scaled(torch.float64), False),
        (scaled(Config(2)), scaled(Config(2)), True),
        (scaled(Config(2)), scaled(Config(2, ("b",))), False),
        (scaled(same), scaled(same), True),
        (scaled(same), scaled(torch.ones(2)), False),
        (scaled(scaled(2)), scaled(scaled(2)), True),
        (scaled(scaled(2)), scaled(scaled(3)), False),
        (functools.partial(scaled(2), times=3), functools.partial(scaled(2), times=3), True),
        (functools.partial(scaled(2), times=3), functools.partial(scaled(2), times=4), False),
        (method.apply, method.apply, True),
        (method.apply, Method(2.0).apply, False),
        (scaled(print), scaled(print), True),
        (scaled(Name("a")), scaled("a"), False),
    ],
)
def test_equal_if_the_computation_is(one: Any, other: Any, equal: bool) -> None:
    assert (key(one) == key(other)) == equal
    if equal:
        assert hash(key(one)) == hash(key(other))


@pytest.mark.parametrize(
    ("name", "value"), [("SCALE", 3.0), ("SCALE", 2), ("TABLE", {"a": [1, 2], "b": (4.0,)}), ("by_global", scaled(2))]
)
def test_globals_count_also_those_of_functions_that_are_called(
    name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = key(through_another)
    assert before == key(through_another)
    monkeypatch.setitem(globals(), name, value)
    assert key(through_another) != before


class Settings:
    """A module that a function names."""

    scale = 1.0


def by_class(x: Any) -> Any:
    return Settings.scale * x


def test_attributes_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attributes of instances, of torch's modules, of classes and modules that a function names."""
    mine, dropout = Method(2.0), torch.nn.Sequential(torch.nn.Dropout(0.1))

    def keys() -> list[Any]:
        return [key(mine.apply), key(scaled(dropout)), key(by_class)]

    before = keys()
    assert before == keys()
    mine.factor = 3.0
    dropout[0].p = 0.2
    monkeypatch.setattr(Settings, "scale", 2.0)
    assert all(
        one != other for one, other in zip(before, (key(mine.apply), key(scaled(dropout)), key(by_class)), strict=True)
    )
    dropout[0].p = 0.1
    assert key(scaled(dropout)) == before[1]
    assert key(scaled(dropout.eval())) != before[1]


def test_contents_count() -> None:
    seen: list[int] = []
    function = scaled(seen)
    before = key(function)
    seen.append(1)
    assert key(function) != before


def test_cycles_end() -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    other: list[Any] = [1]
    other.append(other)
    assert key(loop) == key(other)


def test_the_name_of_a_layer_counts_as_its_label() -> None:
    for one, other in ((scaled("h.0.dropout"), scaled("h.1.dropout")), (Name("h.0.dropout"), Name("h.1.dropout"))):
        assert key(one) != key(other)
        assert key(one, "h.0", "layer") == key(other, "h.1", "layer")
        assert key(one, "h.0", "layer") != key(other, "h", "layer")
    exact = Fingerprint("h.0", "layer", literal=True)
    assert exact.of("h.0") != Fingerprint("h.1", "layer", literal=True).of("h.1"), "only names are names"

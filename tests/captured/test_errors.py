"""Modules that cannot be captured or cut raise one error, which says what to do."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import autofunc as af
from autofunc.errors import ModelError, SplitError
from tests.captured.laws import assert_unchanged, contents
from tests.captured.zoo import ZOO

BATCH = {"x": torch.randn(4, 6, generator=torch.Generator().manual_seed(0))}


class Made(nn.Module):
    """A layer, and a test's forward."""

    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.norm.requires_grad_(False)
        self.register_buffer("steps", torch.zeros(()))
        self.seen: list[Any] = []
        self.kept = [torch.zeros(6)]
        self.nested: dict[str, list[Any]] = {"seen": []}
        self.memory = SimpleNamespace(last=None, count=0)
        self.calls = 0
        self.forward_ = forward

    def forward(self, x: Tensor) -> Any:
        """Call the test's forward."""
        return self.forward_(self, self.linear(x))


def counting(self: Any, h: Tensor) -> Tensor:
    self.calls += 1
    return h * self.calls  # type: ignore[no-any-return]


def caching(self: Any, h: Tensor) -> Tensor:
    before, self.cache = getattr(self, "cache", None), h
    return h if before is None else h + before  # type: ignore[no-any-return]


def collecting(self: Any, h: Tensor) -> Tensor:
    self.seen.append(h)
    return sum(self.seen)  # type: ignore[return-value]


def collecting_deep(self: Any, h: Tensor) -> Tensor:
    self.nested["seen"].append(h)
    return h * len(self.nested["seen"])  # type: ignore[no-any-return]


def remembering(self: Any, h: Tensor) -> Tensor:
    before, self.memory.last = getattr(self.memory, "last", None), h
    return h if before is None else h + before  # type: ignore[no-any-return]


def noting(self: Any, h: Tensor) -> Tensor:
    self.memory.count += 1
    return h


def averaging(self: Any, h: Tensor) -> Tensor:
    self.kept[0].mul_(0.9)
    return h + self.kept[0]


def normalising(self: Any, h: Tensor) -> Tensor:
    return self.norm(h)


def clamping(self: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        self.linear.weight.clamp_(-1, 1)
    return h


def drawing(self: Any, h: Tensor) -> Tensor:
    return h + torch.poisson(h.exp())


def marking_twice(self: Any, h: Tensor) -> Tensor:
    return af.split_point(torch.relu(af.split_point(h, "here")), "here")


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (counting, r"Made \(the module itself\) stores 'calls'"),
        (caching, r"stores 'cache'"),
        (collecting, r"stores 'seen'"),
        (collecting_deep, r"stores 'nested'"),
        (remembering, r"stores 'memory'"),
        (averaging, r"writes to a tensor that it keeps \(aten.mul_"),
        (clamping, r"writes to its parameter 'linear.weight' \(aten.clamp_.*test_errors.py"),
        (drawing, r"draws from the global random generator \(aten.poisson"),
        (marking_twice, r"af.split_point\(x, 'here'\) is passed twice"),
        (lambda self, h: h @ torch.ones(5, 5), r"Made cannot run on this batch: .*test_errors.py"),
    ],
)
def test_forwards(forward: Callable[[Any, Tensor], Any], message: str) -> None:
    module = Made(forward)
    before = contents(module)
    with pytest.raises(ModelError, match=message):
        af.from_module(module, BATCH)
    assert_unchanged(before, module)
    assert module.nested == {"seen": []} and module.memory == SimpleNamespace(last=None, count=0)


def test_plain_values_in_objects_are_restored() -> None:
    module = Made(noting)
    assert af.from_module(module, BATCH).used == ["linear.weight", "linear.bias"]
    assert module.memory.count == 0


def test_a_marker_takes_the_value_first() -> None:
    x = torch.ones(2)
    assert af.split_point(x, "here") is x
    with pytest.raises(
        ModelError, match=r"takes the value first, but got 'here' and Tensor; write af.split_point\(x, 'here'\)"
    ):
        af.split_point("here", x)  # type: ignore[arg-type]


def test_batch_normalisation_in_eval_mode_is_fine() -> None:
    module = Made(normalising).eval()
    model = af.from_module(module, BATCH)
    assert torch.equal(model(model.init(), BATCH), module(BATCH["x"]))


def test_a_batch_that_is_written_to() -> None:
    class Scaling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            x /= 2
            return self.linear(x)

    with pytest.raises(ModelError, match=r"writes to the batch .*x.clone()"):
        af.from_module(Scaling(), BATCH)


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        ({"y": BATCH["x"]}, {}, r"Made.forward needs x, but the batch has y; .*inputs=\['y'\]"),
        ({"y": BATCH["x"]}, {"inputs": ["z"]}, "inputs name 'z', which the batch does not have"),
        (BATCH, {"trainable": ["head.*"]}, "trainable pattern 'head.*' matches no parameter"),
    ],
)
def test_arguments(batch: dict[str, Tensor], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        af.from_module(Made(lambda self, h: h), batch, **options).init_paths([], 0, "cpu")
        _ = af.from_module(Made(lambda self, h: h), batch, **options).spec


def test_not_a_module() -> None:
    with pytest.raises(ModelError, match=r"expected an nn.Module, got function; for a function see af.from_function"):
        af.from_module(functional.relu, BATCH)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (["h.7"], "names no layer: did you mean"),
        (["h.2", "h.1"], "'transformer.h.1' runs before 'transformer.h.2'"),
        (["h.2", "h.2.ln_1"], "a stage already begins at 'transformer.h.2'"),
        (["drop"], "'transformer.drop' is not run|needs no weights|names no layer"),
        (["mlp"], "ambiguous: transformer.h.0.mlp"),
        (["transformer.h"], "'transformer.h' is not run"),
        (9000, "at most, not 9000"),
    ],
)
def test_split_points(points: Any, message: str) -> None:
    build, batch = ZOO["gpt2"]
    model = af.from_module(build(), batch())
    with pytest.raises(SplitError, match=message):
        af.split(model, points)


def test_finer_than_layers() -> None:
    build, batch = ZOO["gpt2"]
    model = af.from_module(build(), batch())
    stages = af.split(model, ["h.0.mlp", "h.3.attn"])
    assert stages[1].layers[0] == "transformer.h.0.mlp" and stages[2].layers[0] == "transformer.h.3.attn"
    assert len(af.split(model, 12)) == 12
    assert [stage.layers[0] for stage in af.split(model, ["h.*"])[1:]] == [f"transformer.h.{index}" for index in range(4)]


def hooking(self: Any, h: Tensor) -> Tensor:
    h.register_hook(lambda grad: grad * 3)
    return h


def test_hooks_on_values() -> None:
    with pytest.raises(ModelError, match=r"Made puts a hook on a gradient \(register_hook\)"):
        af.from_module(Made(hooking), BATCH)


def test_backward_hooks() -> None:
    module = Made(lambda self, h: h)
    module.linear.register_full_backward_hook(lambda *_: None)
    with pytest.raises(ModelError, match=r"Linear \(linear\) has backward hooks"):
        af.from_module(module, BATCH)


def test_without_patterns_nothing_trains() -> None:
    """Rather than everything."""
    model = af.from_module(nn.Linear(3, 3), {"input": torch.randn(2, 3)}, trainable=[])
    assert not any(model.is_trainable(path) for path in model.spec)

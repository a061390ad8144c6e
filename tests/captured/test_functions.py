"""Autograd functions written by the user: their gradients are kept, bit for bit, wherever the module is cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import autofunc as af
from autofunc import tree
from autofunc.errors import ModelError
from tests.captured.laws import plain_loop
from tests.cases import assert_same_tree

Context = Any


class Wrong(torch.autograd.Function):
    """Its backward is not its derivative, so that the two can be told apart."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.scale = scale
        return x**3 * scale

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return 7 * x * grad * ctx.scale, None


class WithContext(torch.autograd.Function):
    """The newer form, with a default, and two results, one without gradient."""

    @staticmethod
    def forward(x: Tensor, power: int = 2) -> tuple[Tensor, Tensor]:
        return x.abs() ** power, x.argmax(-1)

    @staticmethod
    def setup_context(ctx: Context, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Context, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad * x.sign() * 3, None


class Straight(torch.autograd.Function):
    """A straight-through estimator, which passes its gradient on."""

    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Tensor:
        return grad


class Reversed(torch.autograd.Function):
    """Returns its input with another gradient, and a plain value."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, table: list[int]) -> tuple[Tensor, str]:
        return x.view_as(x), "plain"

    @staticmethod
    def backward(ctx: Context, grad: Tensor, _: Any) -> tuple[Tensor, None]:
        return -grad, None


class Product(torch.autograd.Function):
    """Takes a parameter, as a fused linear layer does."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight * 2, grad.flatten(0, -2).T @ x.flatten(0, -2)


bound = Wrong.apply
STEPS: dict[str, Callable[[Tensor, nn.Linear], Tensor]] = {
    "by its class": lambda x, layer: Wrong.apply(layer(x), 0.5),  # type: ignore[no-untyped-call]
    "by a name of its own": lambda x, layer: bound(layer(x), 0.25),  # type: ignore[no-untyped-call]
    "setup_context": lambda x, layer: WithContext.apply(layer(x))[0],  # type: ignore[no-untyped-call]
    "setup_context, by keyword": lambda x, layer: WithContext.apply(layer(x), power=3)[0],  # type: ignore[no-untyped-call]
    "straight through": lambda x, layer: layer(x) + Straight.apply(x * 3),  # type: ignore[no-untyped-call]
    "its input": lambda x, layer: layer(Reversed.apply(x, [1, 2])[0]),  # type: ignore[no-untyped-call]
    "a parameter": lambda x, layer: torch.tanh(Product.apply(layer(x), layer.weight)),  # type: ignore[no-untyped-call]
}


class Stack(nn.Module):
    def __init__(self, step: Callable[[Tensor, nn.Linear], Tensor]) -> None:
        super().__init__()
        self.layers, self.step = nn.ModuleList([nn.Linear(6, 6) for _ in range(4)]), step

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.step(x, layer)  # type: ignore[arg-type]
        return x


def squared(outputs: Tensor, microbatch: Mapping[str, Any]) -> Tensor:
    return outputs.square().mean()


@pytest.mark.parametrize("name", STEPS)
def test_gradients_are_the_users_own(name: str) -> None:
    torch.manual_seed(0)
    module, batch = Stack(STEPS[name]), {"x": torch.randn(4, 6)}
    expected_loss, expected = plain_loop(module, lambda module, each: module(**each), batch, 2, squared)
    stages = af.split(af.from_module(module, batch, verify=True), ["layers.1", "layers.2", "layers.3"])
    s = af.schedule.build("zb_h1", num_ranks=len(stages), num_microbatches=2)
    for engine in ("eager", "graph"):
        pipe = af.pipeline(stages, s, loss=squared, engine=engine)
        loss, grads = af.value_and_grad(pipe)(pipe.init(), batch)
        assert torch.equal(loss, expected_loss)
        for path, grad in tree.flatten(grads).items():
            assert torch.equal(grad, expected[path]), path


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Tensor:
        return grad * 2


def test_writing_to_inputs_is_refused() -> None:
    module = Stack(lambda x, layer: InPlace.apply(layer(x)))  # type: ignore[no-untyped-call]
    with pytest.raises(ModelError, match="InPlace writes to its inputs"):
        af.from_module(module, {"x": torch.randn(4, 6)})


def test_apply_is_restored() -> None:
    before = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
    af.from_module(Stack(STEPS["by its class"]), {"x": torch.randn(4, 6)})
    assert torch.autograd.Function.apply.__func__.__code__ is before  # type: ignore[attr-defined]
    x = torch.ones(2, requires_grad=True)
    assert Wrong.apply(x, 1.0).grad_fn is not None  # type: ignore[no-untyped-call]


def test_a_reentrant_checkpoint_runs_its_function() -> None:
    """torch cannot differentiate it as the plain loop does, so it is compared with the non-reentrant kind."""
    batch, found = {"x": torch.randn(4, 6)}, []
    for reentrant in (True, False):
        torch.manual_seed(0)
        module = Stack(lambda x, layer, how=reentrant: checkpoint(torch.tanh, layer(x), use_reentrant=how))  # type: ignore[misc]
        pipe = af.pipeline(
            af.split(af.from_module(module, batch), ["layers.2"]),
            af.schedule.build("1f1b", num_ranks=2, num_microbatches=2), loss=squared,
        )  # fmt: skip
        found.append(af.value_and_grad(pipe)(pipe.init(), batch))
    assert torch.equal(found[0][0], found[1][0])
    assert_same_tree(found[0][1], found[1][1])

"""Products with changed weights: by hand-written forms of the same product, and as if the change were added."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import autofunc as af
from autofunc.adapters.products import Change, ChangedProducts
from autofunc.errors import ModelError

OUT, FEATURES, RANK, SCALE = 5, 4, 2, 0.5
aten = torch.ops.aten
GENERATOR = torch.Generator().manual_seed(0)


def made(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


W, B, A = made(OUT, FEATURES), made(OUT, RANK), made(RANK, FEATURES)
X, Y, Z, V, BIAS = made(3, 6, FEATURES), made(3, 6, OUT), made(OUT, 7), made(FEATURES), made(OUT)

PRODUCTS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda w: functional.linear(X, w, BIAS),
    "linear by keyword": lambda w: functional.linear(input=X, weight=w),
    "linear, turned": lambda w: functional.linear(Y, w.t()),
    "aten.linear": lambda w: aten.linear.default(X, w, BIAS),
    "@ T": lambda w: X @ w.T,
    "@ mT": lambda w: X @ w.mT,
    "@": lambda w: Y @ w,
    "@ transpose": lambda w: X @ w.transpose(-1, -2),
    "@ permute": lambda w: X @ w.permute(1, 0),
    "matmul by keyword": lambda w: torch.matmul(input=Y, other=w),
    "t @": lambda w: w.t() @ Z,
    "mm": lambda w: torch.mm(Y[0], w),
    "mv": lambda w: torch.mv(w, V),
    "@ vector": lambda w: w @ V,
    "addmm": lambda w: torch.addmm(X[0], Y[0], w, alpha=2.0, beta=3.0),
    "aten.addmm": lambda w: aten.addmm.default(BIAS, X[0], aten.t.default(w)),
    "einsum": lambda w: torch.einsum("btd,od->bto", X, w),
    "einsum, weight first": lambda w: torch.einsum("od, ...d -> ...o", w, X),
    "einsum of a list": lambda w: aten.einsum.default("btd,od->bto", [X, w]),
    "einsum over the rows": lambda w: torch.einsum("bto,od->btd", Y, w),
    "einsum that sums nothing": lambda w: torch.einsum("btd,od->btod", X, w),
    "in another dtype": lambda w: X.float() @ w.float().t(),
    "its sizes": lambda w: torch.tensor([*w.shape, w.size(0), w.dim()]),
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "cat": lambda w: torch.cat([w, w]) @ V,
    "norm": lambda w: w.square().sum(),
    "slice": lambda w: X @ w[1:3].t(),
    "einsum of three": lambda w: torch.einsum("btd,od,o->bto", X, w, BIAS),
}


def changed(function: Callable[[Tensor], Tensor]) -> Tensor:
    """What a function makes of W with its change."""
    products = ChangedProducts("layer")
    products.change(W, Change(B, A, SCALE, "w"))
    with products:
        return function(W)


def test_products_are_those_with_the_changed_weight_and_never_make_it() -> None:
    for name, function in PRODUCTS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = changed(function)
        expected = function(W + SCALE * B @ A)
        tolerance = 1e-4 if name == "in another dtype" else 1e-12
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


def test_the_order_of_operations_is_that_of_peft() -> None:
    """In single precision, with scales that are no powers of two: values and gradients are PEFT's bit for bit."""
    x, w, b, a, bias = (each.float().requires_grad_() for each in (X, W, B, A, BIAS))
    for scale in (2.5, 1 / 3):
        theirs = functional.linear(x, w, bias) + functional.linear(functional.linear(x, a), b) * scale
        products = ChangedProducts("layer")
        products.change(w, Change(b, a, scale, "w"))
        with products:
            ours = functional.linear(x, w, bias)
        assert torch.equal(ours, theirs)
        found, expected = (torch.autograd.grad(made.square().sum(), [x, a, b]) for made in (ours, theirs))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_what_is_no_product_gets_the_changed_weight_and_says_so() -> None:
    for name, function in OTHERS.items():
        with pytest.warns(UserWarning, match="layer 'layer' passes 'w' to .* as much memory as if the weight were trained"):
            found = changed(function)
        torch.testing.assert_close(found, function(W + SCALE * B @ A), msg=lambda text, n=name: f"{n}: {text}")


class Hidden(torch.autograd.Function):
    """A product that autograd is not to look into."""

    @staticmethod
    def forward(ctx: object, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.t()

    @staticmethod
    def backward(ctx: object, cotangent: Tensor) -> tuple[Tensor, None]:
        return cotangent, None


def under_no_grad(x: Tensor, weight: Tensor) -> Tensor:
    with torch.no_grad():
        return x @ weight.t()


APPLIES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "never multiplied by": (lambda x, w: x, "does not multiply by 'w'"),
    "looked up": (lambda x, w: functional.embedding(torch.tensor([1]), w), "looks up rows of 'w'.*modules_to_save"),
    "in a function of its own": (Hidden.apply, "reads 'w' under no_grad, or inside an autograd.Function"),
    "under no_grad": (under_no_grad, "reads 'w' under no_grad"),
    "no input to drop from": (lambda x, w: x @ torch.cat([w, w]).t(), "passes 'w' to cat.*set dropout=0"),
}


def test_what_an_adapter_would_not_do_is_refused() -> None:
    for apply, words in APPLIES.values():
        layer = af.Layer(
            init=lambda key: {"w": key.normal("w", (OUT, FEATURES))},
            apply=lambda params, x, batch, apply=apply: apply(batch["x"], params["w"]).sum(),
        )
        model = af.lora(af.Model({"layer": layer}), ["w"], rank=RANK, dropout=0.5)
        with pytest.raises(ModelError, match=words):
            af.reference_value_and_grad(model, lambda out, _: out, 1)(model.init(), {"x": X[0].float()}, (0, 1))

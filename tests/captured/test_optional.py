"""Parameters, layers and inputs that only some batches use; assertions in a forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autofunc as af
from autofunc import tree
from autofunc.errors import ModelError
from tests.captured.laws import check_layouts, close, plain_loop

LAYOUTS = [(2, "1f1b"), (3, "zb_h1")]


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(4, *shape, generator=torch.Generator().manual_seed(seed))


class Gated(nn.Module):
    """A layer, and a weight of the first layer, serve an optional input; one weight is unused."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mask_token, self.first = nn.Parameter(torch.randn(6)), nn.Linear(6, 6)
        self.extra, self.middle, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, hint: Tensor | None = None) -> dict[str, Tensor]:
        h = torch.tanh(self.first(x))
        if hint is not None:
            h = h + self.extra(hint)
        return {"loss": self.last(torch.tanh(self.middle(h))).square().mean()}


def test_unused_parameters_have_zero_gradients() -> None:
    module = Gated()
    model = check_layouts(module, {"x": rows(6)}, LAYOUTS)
    assert model.notes == (
        "no layer uses mask_token, extra.weight, extra.bias with these inputs (x): the gradients are zero",
    )
    assert set(tree.flatten(model.init())) == {name for name, _ in module.named_parameters()}
    module.extra.requires_grad_(False)
    module.mask_token.requires_grad_(False)
    assert set(af.from_module(module, {"x": rows(6)}).spec) == {
        f"{layer}.{name}" for layer in ("first", "middle", "last") for name in ("weight", "bias")
    }


@pytest.mark.parametrize("points", [["middle"], ["extra", "middle"], ["middle", "last"]])
def test_an_input_that_comes_and_goes(points: list[str]) -> None:
    module, full = Gated(), {"x": rows(6), "hint": rows(6, seed=1)}
    model = af.from_module(module, full)
    stages = af.split(model, points)
    pipe = af.pipeline(stages, af.schedule.build("zb_h1", num_ranks=len(stages), num_microbatches=2))
    params = pipe.init()
    for batch in (full, {"x": full["x"]}, full):
        loss, grads = af.value_and_grad(pipe)(params, batch)
        expected_loss, expected = plain_loop(module, lambda module, each: module(**each), batch, 2, None)
        assert abs(loss - expected_loss) <= 1e-6 * expected_loss
        close(grads, expected)


def test_a_layer_that_begins_elsewhere_for_another_batch() -> None:
    """The example did not use a weight that another batch does, in a layer that does not hold it."""

    class Late(Gated):
        def forward(self, x: Tensor, hint: Tensor | None = None) -> dict[str, Tensor]:
            h = self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))
            return {"loss": (h if hint is None else h * self.mask_token).square().mean()}

    model = af.from_module(Late(), {"x": rows(6)})
    with pytest.raises(ModelError, match=r"layer 'last' uses 'mask_token'.* give an example with all entries"):
        model.specialise({"x": rows(6), "hint": rows(6)})


def tuples(h: Tensor) -> Any:
    return h.square().mean(), h


@pytest.mark.parametrize("returned", [tuples, lambda h: (h.square().mean(),), lambda h: [h.square().mean(), {"h": h}]])
def test_a_tuple_that_begins_with_the_loss(returned: Callable[[Tensor], Any]) -> None:
    class Returning(Gated):
        def forward(self, x: Tensor) -> Any:
            return returned(self.last(self.middle(torch.tanh(self.first(x)))))

    model = check_layouts(Returning(), {"x": rows(6)}, LAYOUTS)
    assert "it returns a tuple that begins with a scalar: without a loss_fn, that is the loss" in model.notes


class Checking(Gated):
    """Checks that there are as many marks as features, as transformers does, and puts the features there."""

    def forward(self, x: Tensor, ids: Tensor) -> dict[str, Tensor]:
        h, features = self.middle(x[:, None].expand(-1, 3, -1)), self.first(x)
        mask = ids == 1
        torch._check(mask.sum().item() * 6 == features.numel())
        h = h.masked_scatter(mask[..., None], features)
        return {"loss": self.last(torch.tanh(h)).square().mean()}


def test_assertions_are_dropped() -> None:
    ids = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0]])
    model = check_layouts(Checking(), {"x": rows(6), "ids": ids}, LAYOUTS)
    assert any(note.startswith("a check of its inputs' values is dropped (File ") for note in model.notes)


class Converting(Gated):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.middle = self.middle.to(self.dtype)
        return {"loss": self.last(torch.tanh(self.middle(self.first(x)))).square().mean()}


def test_conversions_inside_a_forward() -> None:
    """Conversions to a part's own dtype do nothing."""
    check_layouts(Converting(torch.float32), {"x": rows(6)}, LAYOUTS)
    with pytest.raises(ModelError, match=r"converts Linear inside its forward \(.*self.middle.to.*convert the module"):
        af.from_module(Converting(torch.float64), {"x": rows(6)})

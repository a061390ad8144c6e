"""Things a captured forward could silently lose are kept, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import autofunc as af
from autofunc.errors import ModelError
from tests.captured.laws import close, plain_loop

ENGINES = ["eager", "graph"]


def squared(outputs: Tensor, microbatch: Mapping[str, Any]) -> Tensor:
    return outputs.square().mean()


def pipeline(model: af.Model, points: list[str], engine: str = "graph", loss: Any = squared) -> af.Pipeline:
    stages = af.split(model, points)
    s = af.schedule.build("1f1b", num_ranks=len(stages), num_microbatches=2)
    return af.pipeline(stages, s, loss=loss, engine=engine)


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


BATCH = {"x": torch.randn(4, 4, generator=torch.Generator().manual_seed(0))}


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_parameters(register: str) -> None:
    module = chain()
    getattr(module[2].weight, register)(lambda given: None)
    with pytest.raises(ModelError, match=r"the gradient of '2.weight' has a hook"):
        af.from_module(module, BATCH, inputs=["x"])


def test_hooks_added_after_the_capture() -> None:
    module = chain()
    model = af.from_module(module, BATCH, inputs=["x"])
    module[0].bias.register_hook(lambda grad: grad * 2)
    with pytest.raises(ModelError, match=r"'0\.bias' has a hook"):
        af.value_and_grad(pipeline(model, ["2"]))(model.init(), BATCH)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_that_reads_a_parameter(engine: str) -> None:
    module = chain()

    def regularised(outputs: Tensor, microbatch: Mapping[str, Any]) -> Tensor:
        return outputs.square().mean() + module[0].weight.abs().sum()

    pipe = pipeline(af.from_module(module, BATCH, inputs=["x"]), ["2"], engine, regularised)
    with pytest.raises(
        ModelError, match=r"the loss reads a tensor of shape \(4, 4\) that requires a gradient .*test_silent"
    ):
        af.value_and_grad(pipe)(pipe.init(), BATCH)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_layer_that_reads_a_parameter_outside_the_model(engine: str) -> None:
    scale = torch.ones(4, requires_grad=True)
    layers = {
        "a": af.Layer(lambda key: {"w": key.normal("w", (4, 4))}, lambda p, x, batch: batch["x"] @ p["w"]),
        "b": af.Layer(apply=lambda p, x, batch: x * scale),
    }
    pipe = pipeline(af.Model(layers), ["b"], engine)
    with pytest.raises(
        ModelError, match=r"stage 1 \(layers b .. b\) reads a tensor of shape \(4,\) that requires a gradient"
    ):
        af.value_and_grad(pipe)(pipe.init(), BATCH)


def test_complex_parameters() -> None:
    class Rotation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
            self.turn = nn.Parameter(torch.randn(4, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return self.last((self.first(x) * self.turn).real)  # type: ignore[no-any-return]

    module = Rotation()
    with pytest.raises(ModelError, match=r"'turn' is torch.complex64, and only real parameters get gradients"):
        af.from_module(module, BATCH).init()
    module.turn.requires_grad_(False)
    pipe = pipeline(af.from_module(module, BATCH), ["last"])
    _, grads = af.value_and_grad(pipe)(pipe.init(), BATCH)
    close(grads, plain_loop(module, lambda module, batch: module(**batch), BATCH, 2, squared)[1])


# --- entries of the batch ---------------------------------------------------------------------------------------------


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: Tensor | None = None, double: bool = False) -> Tensor:
        x = self.first(x) if scale is None else self.first(x) * scale
        return self.last(x * 2 if double else x)  # type: ignore[no-any-return]


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.inner(x, **kwargs)  # type: ignore[no-any-return]


@pytest.mark.parametrize("extra", [{}, {"scale": torch.rand(4, 1)}, {"scale": torch.rand(4, 1), "double": True}])
def test_keywords_reach_forward(extra: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module, batch = Wrapper(), BATCH | extra
    pipe = pipeline(af.from_module(module, batch), ["inner.last"])
    loss, grads = af.value_and_grad(pipe)(pipe.init(), batch)
    expected_loss, expected = plain_loop(module, lambda module, each: module(**each), batch, 2, squared)
    torch.testing.assert_close(loss, expected_loss)
    close(grads, expected)


def test_keywords_that_forward_does_not_take() -> None:
    batch = BATCH | {"target": torch.rand(4, 1)}
    with pytest.raises(ModelError, match=r"unexpected keyword argument 'target'; name the .*inputs=\['x'\]"):
        af.from_module(Wrapper(), batch)
    af.from_module(Wrapper(), batch, inputs=["x"])


def test_the_size_of_the_whole_batch() -> None:
    batch = BATCH | {"num_items_in_batch": torch.tensor(12)}
    with pytest.raises(ModelError, match="divide its loss by 'num_items_in_batch'"):
        af.from_module(Wrapper(), batch)


# --- writes through views whose operators do not say that they are ----------------------------------------------------

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "einsum": lambda x: torch.einsum("ij->ji", x),
    "dropout that drops nothing": lambda x: functional.dropout(x, 0.5, training=False),
    "feature dropout": lambda x: functional.dropout1d(x[:, None], 0.5, training=False),
    "broadcast_tensors": lambda x: torch.broadcast_tensors(x, torch.zeros(1, 4))[0],
    "meshgrid": lambda x: torch.meshgrid(x[0], torch.zeros(1), indexing="ij")[0],
    "atleast_2d": torch.atleast_2d,
}


@pytest.mark.parametrize("name", VIEWS)
def test_writes_through_views(name: str) -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            VIEWS[name](y)[0] = 1.0
            return self.last(torch.tanh(self.middle(y)) + y)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    module = Writing()
    expected_loss, expected = plain_loop(module, lambda module, each: module(**each), BATCH, 2, squared)
    for engine in ENGINES:
        pipe = pipeline(af.from_module(module, BATCH), ["last"], engine)
        loss, grads = af.value_and_grad(pipe)(pipe.init(), BATCH)
        torch.testing.assert_close(loss, expected_loss)
        close(grads, expected)


# --- left out with a word ---------------------------------------------------------------------------------------------


def test_wrappers_are_dropped() -> None:
    module = chain()
    model = af.from_module(torch.compile(module, backend="eager"), BATCH, inputs=["x"])  # type: ignore[arg-type]
    assert set(model.spec) == {name for name, _ in module.named_parameters()}
    assert model.notes == ("OptimizedModule around Sequential is dropped: the pipeline does its work",)
    assert af.from_module(nn.DataParallel(module), BATCH, inputs=["x"]).notes[0].startswith("DataParallel around")


def test_sparse_gradients_are_dense() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.last = nn.Embedding(16, 4, sparse=True), nn.Linear(4, 4)
            self.bag = nn.EmbeddingBag(16, 4, sparse=True)

        def forward(self, ids: Tensor) -> Tensor:
            return self.last(torch.tanh(self.embed(ids)).mean(1) + self.bag(ids))  # type: ignore[no-any-return]

    module, batch = Words(), {"ids": torch.randint(0, 16, (4, 6))}
    model = af.from_module(module, batch, verify=True)
    assert "dense" in model.notes[0]
    _, grads = af.value_and_grad(pipeline(model, ["last"]))(model.init(), batch)
    module.embed.sparse = module.bag.sparse = False
    close(grads, plain_loop(module, lambda module, each: module(**each), batch, 2, squared)[1])

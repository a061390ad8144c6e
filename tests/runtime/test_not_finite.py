"""Where values stop being finite: action, layer, and forward, input gradient or weight gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autofunc as af
from autofunc.errors import AutofuncError, NotFiniteError, full_message
from autofunc.mesh import data_coordinate
from autofunc.tree import flatten
from tests.cases import mesh_of
from tests.pool import WorkerPool

ENGINES = ["eager", "graph"]


class BadGradient(torch.autograd.Function):
    """x * w, with one gradient divided by a mark, which may be zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, of_x: Tensor, of_w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w, of_x, of_w)
        return x * w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, w, of_x, of_w = ctx.saved_tensors
        return grad * w / of_x, (grad * x).sum(0) / of_w, None, None


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, marks: Tensor) -> Tensor:
        x = self.linear(x) / marks[0, 0]
        return BadGradient.apply(x, self.scale, marks[0, 1], marks[0, 2])  # type: ignore[no-any-return]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor, marks: Tensor, labels: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x, marks if number == 2 else torch.ones_like(marks))
        return nn.functional.cross_entropy(x, labels)


def pipe_of(engine: str, name: str = "zb_h1", mesh: Any = None) -> tuple[Any, Any, dict[str, Tensor]]:
    """Build two stages of two blocks, four microbatches; the third block divides by `marks`."""
    batch = {"x": torch.randn(8, 4), "marks": torch.ones(8, 3), "labels": torch.arange(8) % 4}
    model = af.from_module(Net(), batch)
    s = af.schedule.build(name, num_ranks=2, num_microbatches=4)
    pipe = af.pipeline(af.split(model, ["blocks.2"]), s, engine=engine, mesh=mesh)
    return pipe, pipe.init() if mesh is not None else model.init(), batch


def message_of(pipe: Any, params: Any, batch: Any) -> str:
    af.value_and_grad(pipe)(params, batch)  # goes through
    with pytest.raises(NotFiniteError) as caught:
        pipe.check_finite(params, batch)
    return full_message(caught.value)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("mark", "action", "words"),
    [
        (0, "1F2", "forward: layer 'blocks.2' makes infinite values"),
        (1, "1I2", "backward: layer 'blocks.2': the gradient of its input"),
        (2, "1W2", "weight gradient: the gradient of 'blocks.2.scale'"),
    ],
    ids=["forward", "input", "weight"],
)
def test_the_first_place(mark: int, action: str, words: str, engine: str) -> None:
    pipe, params, batch = pipe_of(engine)
    pipe.check_finite(params, batch)  # the first step of this pipeline
    batch["marks"][4:6, mark] = 0.0  # of microbatch 2
    message = message_of(pipe, params, batch)
    assert words in message
    assert f"rank 1, step 2, action {action}" in message and "(stage 1, microbatch 2)" in message


def of_all_processes(mark: int, place: int) -> tuple[str, Any]:
    """Return a process's errors if microbatch 2 of some rows is bad in stage 1, and if a parameter of stage 0 is."""
    mesh = mesh_of(pp=2, dp_replicate=2)
    pipe, params, batch = pipe_of("graph", mesh=mesh)
    if data_coordinate(mesh)[0] == place:
        batch["marks"][4:6, mark] = 0.0
    message = message_of(pipe, params, batch)
    for leaf in flatten(params).values() if mesh.get_local_rank("pp") == 0 else ():
        leaf.fill_(float("inf"))
    with pytest.raises(NotFiniteError, match=r"'blocks\.0\.linear\.bias' is not finite before the step") as caught:
        pipe.check_finite(params, batch)
    return message, caught.value.rank


@pytest.mark.parametrize(("mark", "place", "action"), [(0, 1, "1F2"), (1, 0, "1I2")])
def test_all_processes_name_the_first_place(workers: WorkerPool, mark: int, place: int, action: str) -> None:
    found = workers.run(of_all_processes, mark, place)
    assert len(set(found)) == 1 and f"rank 1, step 1, action {action}" in found[0][0]


def test_in_layers_that_are_functions() -> None:
    def apply(p: Any, x: Any, batch: Any) -> Tensor:
        x = batch["x"] if x is None else x
        return (x @ p["w"]).log() if p["w"].shape[1] == 3 else x @ p["w"]

    layers = {
        name: af.Layer(init=lambda key, n=n, m=m: {"w": key.ones("w", (n, m))}, apply=apply)
        for name, n, m in (("one", 4, 4), ("two", 4, 3), ("three", 3, 2))
    }
    model = af.Model(layers)
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=2)
    pipe = af.pipeline(af.split(model, ["two"]), s, loss=lambda x, batch: x.mean())
    batch = {"x": torch.ones(4, 4)}
    pipe.check_finite(model.init(), batch)
    batch["x"][3] = -1.0
    message = message_of(pipe, model.init(), batch)
    assert "forward: layer 'two' makes NaN" in message and "action 1F1" in message


@pytest.mark.parametrize("engine", ENGINES)
def test_a_mean_over_no_labels(engine: str) -> None:
    pipe, params, batch = pipe_of(engine, "1f1b")
    batch["labels"][2:4] = -100
    message = message_of(pipe, params, batch)
    assert "action 1F1" in message and "makes NaN" in message


def test_parameters_and_entries_that_were_not_finite() -> None:
    pipe, params, batch = pipe_of("graph")
    broken = params.clone()
    broken["blocks", "1", "scale"][3] = float("nan")
    with pytest.raises(
        NotFiniteError, match=r"parameter 'blocks.1.scale' is not finite before the step \(1 of 4 elements\)"
    ):
        pipe.check_finite(broken, batch)
    batch["x"][7, 0] = float("inf")
    message = message_of(pipe, params, batch)
    assert "action 0F3" in message and "entry 'x' of the batch is not finite" in message


def test_every_step_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOFUNC_DEBUG", "nan")
    pipe, params, batch = pipe_of("graph")
    af.value_and_grad(pipe)(params, batch)
    batch["marks"][0, 0] = 0.0
    with pytest.raises(NotFiniteError, match=r"layer 'blocks.2' makes infinite values") as caught:
        af.value_and_grad(pipe)(params, batch)
    assert (caught.value.rank, caught.value.step, caught.value.stage, caught.value.microbatch) == (1, 2, 1, 0)
    monkeypatch.setenv("AUTOFUNC_DEBUG", "nans")
    with pytest.raises(AutofuncError, match="did you mean nan"):
        pipe_of("graph")

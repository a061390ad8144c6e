"""State of layers whose tokens are cut: every rank keeps what one process would. Ranks are threads, or processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import autofunc as af
from autofunc.context_parallel.axis import ContextAxis
from autofunc.context_parallel.specialised import over_tokens
from autofunc.errors import ModelError
from autofunc.losses import evaluate
from autofunc.tree import flatten
from tests.cases import cut_evenly, mesh_of
from tests.context_parallel.test_layers import TOKENS, WIDTH, _tracing, batch_of, squared_error
from tests.context_parallel.threads import Threads, on_ranks
from tests.pool import WorkerPool


class Normalised(nn.Module):
    """Counts its steps, follows the mean of its tokens, and normalises them as told."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.words = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList([norm, nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))])
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids)
        if self.training:
            with torch.no_grad():
                self.steps.add_(1)
                self.mean.lerp_(x.mean((0, 1)), 0.1)
        x = (x - self.mean).transpose(1, 2)
        made: Tensor = self.blocks[1](self.blocks[0](x).transpose(1, 2))
        return made


class Nearest(nn.Module):
    """The nearest codes, which follow their tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(4, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x.transpose(1, 2), self.codes).argmin(-1)
        if self.training:
            with torch.no_grad():
                chosen = functional.one_hot(nearest, 4).to(x.dtype)
                self.codes.lerp_((chosen.transpose(1, 2) @ x.transpose(1, 2)).sum(0), 0.1)
        return x + self.codes[nearest].transpose(1, 2)


def model_of(norm: nn.Module, batch: Mapping[str, Any]) -> af.Model:
    torch.manual_seed(0)
    return af.from_module(Normalised(norm).double(), batch, inputs=["input_ids"])


def made_by(model: af.Model, batch: Mapping[str, Any], axis: ContextAxis | None, *, training: bool = True) -> Any:
    """Sum of the loss, its gradients, and the new state."""
    flat = {path: leaf.detach().clone().requires_grad_() for path, leaf in flatten(model.init()).items()}
    leaves = {path: model.lookup(flat, path) for path in model.spec}
    with _tracing:
        made: Any = model.specialise(batch, {path: leaf.dtype for path, leaf in flat.items()}, training=training)
        if axis is not None:
            made = over_tokens(made, model, leaves, batch, axis).with_loss(squared_error, batch, lambda x: x)
    states: dict[str, dict[str, Tensor]] = {}
    for path, leaf in flatten(model.init_state()).items():
        states.setdefault(model.layer_of(path) or "", {})[model.inner_path(path)] = leaf
    x, after = made.run(list(model.layers), model.layer_trees(leaves), None, batch, states)
    terms = evaluate(squared_error, x, batch) if axis is None else made.loss_terms(x, batch)
    return terms.sum.detach(), torch.autograd.grad(terms.sum, list(flat.values()), allow_unused=True), after


NORMS: Mapping[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm1d(WIDTH),
    "synchronised": lambda: nn.SyncBatchNorm(WIDTH),
    "none": nn.Identity,
}


@pytest.mark.parametrize("norm", NORMS)
def test_ranks_keep_what_one_process_keeps(norm: str) -> None:
    batch = batch_of()
    model = model_of(NORMS[norm](), batch)
    for training in (True, False):
        total, grads, after = made_by(model, batch, None, training=training)

        def run(ranks: Threads, name: str, training: bool = training) -> Any:
            return made_by(model, batch, ContextAxis(name, 2, "allgather"), training=training)

        found, _ = on_ranks(2, run)
        torch.testing.assert_close(sum(each for each, _, _ in found), total)
        for place, grad in enumerate(grads):
            parts = [each[place] for _, each, _ in found]
            assert (grad is None) == (parts == [None, None])
            if grad is not None:
                torch.testing.assert_close(sum(parts), grad)
        for _, _, kept in found:
            torch.testing.assert_close(kept, after)
        same = [
            torch.equal(after[model.layer_of(path) or ""][model.inner_path(path)], leaf)
            for path, leaf in flatten(model.init_state()).items()
        ]
        assert all(same) == (not training)


@pytest.mark.parametrize(
    ("norm", "operator"),
    [(lambda: nn.InstanceNorm1d(WIDTH, track_running_stats=True), "instance_norm"), (Nearest, "cdist")],
)
def test_statistics_that_cannot_be_summed_are_refused(norm: Callable[[], nn.Module], operator: str) -> None:
    batch = batch_of()
    model = model_of(norm(), batch)
    with pytest.raises(ModelError, match=rf"runs .*{operator}.*cut over cp=2 ranks.*use cp=1"):
        on_ranks(2, lambda ranks, name: made_by(model, batch, ContextAxis(name, 2, "ring")))


def steps_of(axes: dict[str, int]) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of some steps, and the state after them."""
    batch = batch_of(4)
    model = model_of(nn.BatchNorm1d(WIDTH), batch)
    s = af.schedule.build("1f1b", num_ranks=axes.get("pp", 1), num_microbatches=2)
    pipe = af.pipeline(
        cut_evenly(model, s.num_stages), s, loss=squared_error, mesh=mesh_of(**axes) if axes else None
    )  # fmt: skip
    params, state, losses = pipe.init(), pipe.init_state(), []
    optimizer = af.optimizer(torch.optim.AdamW, lr=1e-2)
    kept = optimizer.init(params)
    for _ in range(3):
        (loss, state), grads = af.value_and_grad(pipe, has_state=True)(params, batch, state=state)
        params, kept = optimizer.update(grads, kept, params)
        losses.append(loss.item())
    return [*losses, pipe(params, batch, state=state).item()], flatten(pipe.gather(state))


def test_a_pipeline_follows_one_process(workers: WorkerPool) -> None:
    losses, state = steps_of({})
    assert TOKENS % 8 == 0
    for found, kept in workers.run(steps_of, {"pp": 2, "cp": 2}):
        torch.testing.assert_close(found, losses, rtol=1e-6, atol=1e-6)  # they are fp32
        for path, leaf in kept.items():
            torch.testing.assert_close(leaf, state[path], rtol=1e-9, atol=1e-9)

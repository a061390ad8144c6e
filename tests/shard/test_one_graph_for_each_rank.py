"""The law of per-rank graphs, in one process: with threads as ranks, they compute what the whole graph computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import autofunc as af
from autofunc import tree
from autofunc.spreading import AxisPlan, along, piece_of, put_together
from autofunc.spreading.movements import gather
from tests.shard.spread_models import batch_of, model_of
from tests.thread_ranks import Meeting

KEY = af.random.make_key(3)


class ThreadAxis:
    """A `spreading.Axis` of threads; counts what is exchanged."""

    fingerprint = "threads"

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank, self.size = meeting, rank, meeting.size
        self.counts: Counter[str] = Counter()

    def _of_all(self, x: Tensor, kind: str) -> list[Tensor]:
        self.counts[kind] += 1
        return self.meeting.of_all(self.rank, x.detach().clone())

    def all_reduce(self, x: Tensor, how: str) -> Tensor:
        stacked = torch.stack(self._of_all(x, "all_reduce"))
        return stacked.sum(0) if how == "sum" else stacked.amax(0)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._of_all(x, "all_gather"))

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return torch.stack(self._of_all(x, "reduce_scatter")).sum(0).chunk(self.size)[self.rank].clone()

    def handed_out(self, x: Tensor, dim: int) -> Tensor:
        return gather(x, "tp", dim, (x.shape[dim] * self.size,))


def on_threads(size: int, work: Callable[[ThreadAxis], Any]) -> tuple[list[Any], ThreadAxis]:
    """Run a function on each thread; return the results."""
    meeting = Meeting(size)
    axes = [ThreadAxis(meeting, rank) for rank in range(size)]
    return meeting.run(lambda rank: work(axes[rank])), axes[0]


Grads = dict[str, Tensor | None]


def loss_and_grads(
    model: af.Model, params: Mapping[str, Tensor], batch: dict[str, Any], over: Any = None
) -> tuple[Tensor, Grads, Counter[str]]:
    """By autograd on the layers, one after the other; and what was exchanged in the forward."""
    leaves = {path: leaf.clone().requires_grad_(leaf.is_floating_point()) for path, leaf in params.items()}
    plan, axis = over if over is not None else (None, None)
    specialised = model.specialise(batch, over=plan)
    trees = model.layer_trees({path: leaves[model.canonical(path)] for path in model.spec})
    with along({} if axis is None else {"tp": axis}):
        outputs, _ = specialised.run(list(model.layers), trees, None, batch)
        forward = Counter(axis.counts) if axis is not None else Counter()
        grads = torch.autograd.grad(outputs.loss, list(leaves.values()), allow_unused=True)
    return outputs.loss.detach(), dict(zip(leaves, grads, strict=True)), forward


def check(
    name: str, size: int, table: Any = None, *, sequence: bool = False, tokens: int = 8, **changed: Any
) -> Counts:  # fmt: skip
    """Loss and gradients of ranks are those of one; returns the plan, and what is exchanged forward and backward."""
    batch = {**{entry: leaf[:, :tokens] for entry, leaf in batch_of(name).items()}, "key": KEY}
    model = af.from_module(model_of(name, **changed), batch_of(name))
    params = tree.flatten(model.init())
    loss, grads, _ = loss_and_grads(model, params, batch)
    plan = model.over_ranks("tp", size, table, sequence=sequence)

    def work(axis: ThreadAxis) -> Any:
        own = {
            path: piece_of(leaf, plan.cuts[path], size, axis.rank).clone() if path in plan.cuts else leaf
            for path, leaf in params.items()
        }
        return loss_and_grads(model, own, batch, (plan, axis))

    made, axis = on_threads(size, work)
    for found, _, _ in made:
        torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-6)
    for path, grad in grads.items():
        parts = [found[path] for _, found, _ in made]
        if grad is None:
            assert parts == [None] * size, path
            continue
        if path in plan.cuts:
            whole = put_together(parts, plan.cuts[path])
        elif path in plan.terms:
            whole = torch.stack(parts).sum(0)
        else:
            whole = parts[0]
            assert all(torch.equal(part, whole) for part in parts), f"{path}: the same on every rank"
        worst = (whole - grad).abs().max() / grad.abs().max().clamp_min(1e-3)
        assert worst < 2e-5, f"{path}: {worst}"
    return plan, dict(made[0][2]), dict(axis.counts - made[0][2])


Counts = tuple[AxisPlan, dict[str, int], dict[str, int]]
MODELS = ("llama", "qwen3", "gemma3", "phi3", "gpt2", "bert", "t5", "mixtral", "qwen3_moe", "olmoe")


FIRST = [
    ("llama", None, True),
    ("gpt2", None, False),
    ("t5", None, True),
    ("mixtral", "derived", False),
    ("olmoe", None, True),
    ("olmoe", "derived", False),
    ("torch", None, True),
    ("torch_attention", None, False),
    ("normed", None, True),
]


@pytest.mark.parametrize(("name", "table", "sequence"), FIRST)
def test_first_models(name: str, table: str | None, sequence: bool) -> None:
    check(name, 2, table, sequence=sequence)


@pytest.mark.full
@pytest.mark.parametrize("changed", [{}, {"batch_first": False, "bias": False}, {"norm_first": True, "dropout": 0.0}])
@pytest.mark.parametrize("sequence", [False, True])
def test_layers_of_torch(sequence: bool, changed: dict[str, Any]) -> None:
    for decodes in (False, True):
        check("torch", 2, sequence=sequence, decodes=decodes, **changed)
    check("torch", 4, sequence=sequence, **changed)


@pytest.mark.full
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("table", [None, "derived"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, table: str | None, sequence: bool) -> None:
    check(name, 2, table, sequence=sequence)


@pytest.mark.full
@pytest.mark.parametrize("sequence", [False, True])
def test_a_block_of_experts_exchanges_what_a_dense_one_does(sequence: bool) -> None:
    two, one = (check("mixtral", 2, sequence=sequence, num_hidden_layers=blocks) for blocks in (2, 1))
    each = {"all_gather": 2, "reduce_scatter": 2} if sequence else {"all_reduce": 2}
    for after, before in zip(two[1:], one[1:], strict=True):
        assert dict(Counter(after) - Counter(before)) == each


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_batch_that_differs_from_the_example(name: str) -> None:
    """Its tokens do not divide, so that its stream is not cut, and gradients that had terms for the example are whole."""
    plan, forward, _ = check(name, 2, sequence=True, tokens=7)
    assert plan.sequence and plan.terms and "reduce_scatter" not in forward

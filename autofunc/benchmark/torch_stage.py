"""One of our stages as a module for torch's pipeline: the same operators on the same memory of parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from autofunc import tree
from autofunc.batch import Microbatch
from autofunc.errors import ModelError
from autofunc.fake import fake_like, fake_mode, naming_errors
from autofunc.graph.trace import trace
from autofunc.splitting import Boundary, Stage, StageContext

ENTRY = "batch_"
"""Prefix of a microbatch's tensors as keyword arguments of every module, followed by the name of the entry, and by the
tensor's number if the entry holds several."""

MakeModule = Callable[[Stage, Mapping[str, Tensor]], nn.Module]
"""From a stage and its parameters by canonical path to a module that works like `StageModule` and has its `holders`: a
user's own instead of a traced one. Its `nn.Parameter`s may share memory with the given parameters."""


def entries_of(microbatch: Microbatch) -> dict[str, Tensor]:
    """Return the tensors of a microbatch as keyword arguments."""
    found = {}
    for name, value in microbatch.items():
        for number, leaf in enumerate(tree.leaves_and_spec(value)[0]):
            if isinstance(leaf, Tensor):
                found[f"{ENTRY}{name}" if leaf is value else f"{ENTRY}{name}_{number}"] = _with_a_dim(leaf)
    return found


def _with_a_dim(leaf: Tensor) -> Tensor:
    return leaf if leaf.dim() else leaf.reshape(1)


class Ends(NamedTuple):
    """A stage's inputs and outputs, as meta tensors, which torch takes as examples."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


def ends_of(context: StageContext, returned: Boundary) -> Ends:
    """Return the inputs and outputs of a stage: the first has no inputs, the last returns the loss and its weight."""
    made: tuple[Tensor, ...]
    if context.with_loss:
        made = (torch.empty((), device="meta", requires_grad=True), torch.empty((), device="meta"))
    else:
        made = _like(returned)
    return Ends(_like(context.received) if context.received is not None else (), made)


def _like(boundary: Boundary) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty(value.shape, dtype=value.dtype, device="meta", requires_grad=value.needs_grad)
        for value in boundary.values
    )


class StageModule(nn.Module):
    """A stage whose forward is one graph of its layers' operators, which autograd and `torch.compile` take.

    `forward(*received, **entries)` returns the stage's outputs; the last stage returns the sum of the loss and its weight.

    Args:
        stage: the stage.
        params: by canonical path; the module's parameters share their memory, one per holder.
        graph: from `graph_of`.
    """

    def __init__(self, stage: Stage, params: Mapping[str, Tensor], graph: fx.GraphModule) -> None:
        super().__init__()
        self.holders = {
            path: nn.Parameter(leaf.detach(), requires_grad=wanted)
            for path, leaf, wanted in zip(stage.holders, stage.leaves(params), stage.trainable, strict=True)
        }
        for number, leaf in enumerate(self.holders.values()):
            self.register_parameter(f"p{number}", leaf)
        self._leaves = list(self.holders.values())
        self.graph = graph

    def forward(self, *received: Tensor, **entries: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        return tuple(self.graph(*self._leaves, *received, *entries.values()))


def graph_of(context: StageContext) -> fx.GraphModule:
    """Trace the forward of a stage, with the loss if it is the last, as a graph of (parameters, received, entries).

    Args:
        context: the stage.

    Raises:
        ModelError: if the stage cannot be recorded, or keeps state; naming the stage.
    """
    stage = context.stage
    if stage.states:
        raise ModelError(f"{stage.title} keeps state, which torch's pipeline cannot pass from microbatch to microbatch")
    leaves, spec = tree.leaves_and_spec(dict(context.microbatch))
    received = context.received.values if context.received is not None else ()
    counts = (len(stage.holders), len(received))

    def run(*given: Tensor) -> list[Tensor]:
        params, inputs, rest = given[: counts[0]], given[counts[0] : sum(counts)], iter(given[sum(counts) :])
        microbatch = tree.from_leaves([_as(leaf, rest) for leaf in leaves], spec)
        x, _ = context.run(stage.bind(list(params)), inputs, microbatch, [])
        if context.with_loss:
            terms = context.loss_terms(x, microbatch)
            return [terms.sum, terms.weight]
        return context.describe(x)[1]

    with fake_mode() as mode, torch.enable_grad(), naming_errors(stage.title):
        given = [
            *(
                leaf.requires_grad_(wanted)
                for leaf, wanted in zip(context.empty_parameters(), stage.trainable, strict=True)
            ),
            *(_empty(value.shape, value.dtype, value.needs_grad, context.device) for value in received),
            *(_with_a_dim(fake_like(mode, leaf)) for leaf in leaves if isinstance(leaf, Tensor)),
        ]
        graph = trace(run, *given, above_autograd=True)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _as(leaf: Any, rest: Iterator[Tensor]) -> Any:
    """Return the stand-in for a leaf of the microbatch."""
    if not isinstance(leaf, Tensor):
        return leaf
    return next(rest) if leaf.dim() else next(rest).reshape(())


def _empty(shape: Sequence[int], dtype: torch.dtype, needs_grad: bool, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device).requires_grad_(needs_grad)


def stacked(microbatches: Sequence[Microbatch]) -> dict[str, Tensor]:
    """Concatenate the microbatches of a step as keyword arguments, which torch cuts along dim 0.

    0-dim tensors, such as a key, become 1-dim.
    """
    each = [entries_of(microbatch) for microbatch in microbatches]
    first: dict[str, Any] = each[0]
    return {name: torch.cat([entries[name] for entries in each]) for name in first}

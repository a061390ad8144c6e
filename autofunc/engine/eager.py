"""The eager engine: autograd on the pure stage function, one graph per microbatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autofunc import tree
from autofunc.engine.functions import Accumulators, Microbatch, Produced
from autofunc.random import drawing
from autofunc.schedule import StageBytes
from autofunc.splitting import Boundary, Ready, StageContext


class AutogradLeaves(NamedTuple):
    """A stage's parameters as leaves of autograd graphs, shared by the microbatches of a step."""

    tree: dict[str, dict[str, Any]]
    trainable: list[Tensor]
    ready: Ready | None


class AutogradGraph(NamedTuple):
    """The residuals of one microbatch, for B, `I` or W: what to differentiate, with respect to what."""

    roots: list[Tensor]  # outputs that need a gradient, or the loss
    inputs: list[Tensor]  # received values that need a gradient
    weights: list[Tensor]


class Rerun(NamedTuple):
    """The residuals of one microbatch with remat: all it takes to record its graph again."""

    bound: AutogradLeaves
    state: Sequence[Tensor]
    inputs: list[Tensor]
    microbatch: Microbatch


class EagerStage:
    """Implements `StageFunctions` by `torch.autograd.grad`.

    `backward_input` keeps the whole graph for `backward_weight`: correct, not small. What autograd keeps is unknown
    beforehand, so all received values count as kept.

    Args:
        context: the stage.
        returned: its boundary.
        remat: keep only what the stage received, and rerun the stage in B or `I`.
    """

    exact_bytes = False
    constants: tuple[Tensor, ...] = ()

    def __init__(self, context: StageContext, returned: Boundary, *, remat: bool = False) -> None:
        self._remat, self._returned = remat, returned
        self._context, self._stage, self._partitioning = context, context.stage, context.setting.partitioning
        self._with_loss = context.with_loss
        self._input_needs_grad = context.input_wants
        self._trainable = self._stage.trainable_holders
        self.terms = [False] * len(self._trainable)
        values = returned.values if not context.with_loss else ()
        inputs = tuple(range(len(context.input_wants)))
        cotangents = tuple(value.num_bytes for value in values if value.needs_grad)
        self.bytes = StageBytes(
            tuple(value.num_bytes for value in values), cotangents, 0, 0, context.accumulator_bytes,
            kept_inputs=inputs, weight_inputs=inputs, weight_cotangents=tuple(range(len(cotangents))),
        )  # fmt: skip

    def bind(self, leaves: list[Tensor], ready: Ready | None = None) -> AutogradLeaves:
        """Make the parameters leaves of new graphs. Memory is shared; the given tensors are not changed."""
        stage = self._stage
        fresh = [
            self._partitioning.parameter(path, leaf).requires_grad_(wanted)
            for path, leaf, wanted in zip(stage.holders, leaves, stage.trainable, strict=True)
        ]
        return AutogradLeaves(stage.bind(fresh), [leaf for leaf in fresh if leaf.requires_grad], ready)

    def evaluate(
        self, bound: AutogradLeaves, state: Sequence[Tensor], inputs: list[Tensor], microbatch: Microbatch
    ) -> Produced:
        """See `StageFunctions.evaluate`."""
        with torch.no_grad(), self._partitioning.running():
            return self._produce(bound, state, inputs, microbatch)[0]

    def forward(
        self, bound: AutogradLeaves, state: Sequence[Tensor], inputs: list[Tensor], microbatch: Microbatch
    ) -> tuple[Produced, AutogradGraph | Rerun]:
        """See `StageFunctions.forward`."""
        if self._remat:
            return self.evaluate(bound, state, inputs, microbatch), Rerun(bound, state, list(inputs), microbatch)
        return self._record(bound, state, inputs, microbatch)

    def _record(
        self, bound: AutogradLeaves, state: Sequence[Tensor], inputs: list[Tensor], microbatch: Microbatch
    ) -> tuple[Produced, AutogradGraph]:
        """Run the stage and record its autograd graph."""
        leaves = [leaf.detach().requires_grad_(w) for leaf, w in zip(inputs, self._input_needs_grad, strict=True)]
        with torch.enable_grad(), self._partitioning.running():
            produced, roots = self._produce(bound, state, leaves, microbatch)
        needing = [leaf for leaf in leaves if leaf.requires_grad]
        return produced, AutogradGraph([root for root in roots if root.requires_grad], needing, bound.trainable)

    def _graph(self, residuals: AutogradGraph | Rerun) -> AutogradGraph:
        """Return the graph to differentiate, recorded now if it was not kept."""
        if isinstance(residuals, AutogradGraph):
            return residuals
        return self._record(*residuals)[1]

    def backward(self, residuals: AutogradGraph | Rerun, cotangents: list[Tensor], sums: Accumulators) -> list[Tensor]:
        """See `StageFunctions.backward`."""
        residuals = self._graph(residuals)
        inputs, weights = residuals.inputs, residuals.weights
        grads = self._grad(residuals, cotangents, [*inputs, *weights], keep=False)
        self._add(grads[len(inputs) :], sums)
        return _separate(_dense(grads[: len(inputs)], inputs), cotangents)

    def backward_input(
        self, residuals: AutogradGraph | Rerun, cotangents: list[Tensor], sums: Accumulators
    ) -> tuple[list[Tensor], tuple[AutogradGraph, list[Tensor]]]:
        """See `StageFunctions.backward_input`."""
        residuals = self._graph(residuals)
        grads = self._grad(residuals, cotangents, residuals.inputs, keep=True)
        return _separate(_dense(grads, residuals.inputs), cotangents), (residuals, cotangents)

    def backward_weight(self, weight_residuals: tuple[AutogradGraph, list[Tensor]], sums: Accumulators) -> None:
        """See `StageFunctions.backward_weight`."""
        residuals, cotangents = weight_residuals
        self._add(self._grad(residuals, cotangents, residuals.weights, keep=False), sums)

    def _grad(
        self, residuals: AutogradGraph, cotangents: list[Tensor], of: list[Tensor], keep: bool
    ) -> list[Tensor | None]:  # fmt: skip
        roots = residuals.roots
        if not roots or not of:
            return [None] * len(of)
        seeds = [torch.ones_like(roots[0])] if self._with_loss else cotangents
        with self._partitioning.running(), drawing(None, ""):
            return list(torch.autograd.grad(roots, of, seeds, retain_graph=keep, allow_unused=True))

    def _add(self, grads: list[Tensor | None], sums: Accumulators) -> None:
        """Add the gradients of all trainable holders to their sums."""
        parts: list[Tensor | None] = [None] * len(grads)
        for number, (path, grad) in enumerate(zip(self._trainable, grads, strict=True)):
            if grad is not None:
                parts[number], self.terms[number] = self._partitioning.gradient(path, grad)
        sums.add(parts)

    def _produce(
        self, bound: AutogradLeaves, state: Sequence[Tensor], inputs: list[Tensor], microbatch: Microbatch
    ) -> tuple[Produced, list[Tensor]]:
        """Run the stage; return its outputs and the tensors to differentiate."""
        x, after = self._context.run(bound.tree, inputs, microbatch.entries, state, bound.ready)
        after = _separate(after, [*state, *inputs])
        if self._with_loss:
            terms = self._context.loss_terms(x, microbatch.entries)
            aux = tree.map_leaves(
                lambda leaf: _separate([leaf], inputs)[0] if isinstance(leaf, Tensor) else leaf, terms.aux
            )
            return Produced([], terms.sum.detach(), terms.weight, aux, after), [terms.sum]
        tensors = self._returned.tensors(self._context.with_all_tokens(x), self._partitioning)
        return Produced(_separate([tensor.detach() for tensor in tensors], inputs), state=after), tensors


def _separate(tensors: list[Tensor], given: list[Tensor]) -> list[Tensor]:
    """Clone the tensors that share memory with `given`."""
    taken = {tensor.untyped_storage().data_ptr() for tensor in given}
    return [tensor.clone() if tensor.untyped_storage().data_ptr() in taken else tensor for tensor in tensors]


def _dense(grads: list[Tensor | None], like: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(grads, like, strict=True)]

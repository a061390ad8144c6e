"""The graph engine: each stage captured once, and run as four plain functions of tensors, without autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from autofunc import tree
from autofunc.engine.capture import TENSOR, Joint, capture
from autofunc.engine.emit import Runnable, emit
from autofunc.engine.footprint import footprint
from autofunc.engine.functions import Accumulators, Microbatch, Produced, StageContext
from autofunc.engine.partition import Piece, partition


class Bound(NamedTuple):
    """A stage's parameters, as each piece takes them."""

    forward: list[Tensor]
    backward: list[Tensor]
    backward_input: list[Tensor]
    backward_weight: list[Tensor]


class Residuals(NamedTuple):
    """What one microbatch keeps between two pieces. `values` is emptied by the piece that uses them."""

    bound: Bound
    values: list[Tensor]


class GraphStage:
    """Implements `StageFunctions` by graphs cut ahead of time.

    `backward` and `backward_weight` add to the accumulators themselves. Residuals, cotangents and received values are let
    go of at their last use. For a first stage, which has no input gradient, `backward_input` is empty and
    `backward_weight` is the whole backward.

    Args:
        context: the stage and what it is captured on.
    """

    def __init__(self, context: StageContext) -> None:
        self._with_loss = context.with_loss
        joint = capture(context)
        pieces = partition(joint)
        self.joint, self.pieces = joint, pieces
        self.bytes, self.exact_bytes = footprint(joint, pieces, context)
        order, attributes = list(joint.graph.nodes), _attributes(joint)

        def runnable(piece: Piece, name: str) -> Runnable:
            return emit(piece, order, attributes, f"stage_{context.stage.index}_{name}")

        self._forward = runnable(pieces.forward, "forward")
        self._evaluate = runnable(pieces.evaluate, "evaluate")
        self._backward = runnable(pieces.backward, "backward")
        self._backward_weight = runnable(pieces.backward_weight, "backward_weight")
        self._backward_input = runnable(pieces.backward_input, "backward_input") if pieces.backward_input else None
        self._backward_adds, self._input_adds, self._weight_adds = (
            [number for number, _ in piece.adds] if piece is not None else []
            for piece in (pieces.backward, pieces.backward_input, pieces.backward_weight)
        )
        self._num_outputs = len(joint.outputs)
        self._input_grads = joint.input_grads
        self._num_input_grads = sum(node is not None for node in joint.input_grads)
        self._input_likes = [node for node, wanted in zip(joint.inputs, context.input_wants, strict=True) if wanted]
        self._seed = [torch.ones_like(_empty(node)) for node in joint.cotangents] if context.with_loss else []
        self.constants = [*attributes.values(), *self._seed]

    def bind(self, leaves: list[Tensor]) -> Bound:
        """The parameters, as they are."""
        leaves = [leaf.detach() for leaf in leaves]
        pieces = self.pieces
        return Bound(
            *(
                [leaves[number] for number in piece.params] if piece is not None else []
                for piece in (pieces.forward, pieces.backward, pieces.backward_input, pieces.backward_weight)
            )
        )

    def evaluate(self, bound: Bound, inputs: list[Tensor], microbatch: Microbatch) -> Produced:
        """See `StageFunctions.evaluate`."""
        return self._produced(self._evaluate([*bound.forward, *inputs, *microbatch.tensors]))

    def forward(self, bound: Bound, inputs: list[Tensor], microbatch: Microbatch) -> tuple[Produced, Residuals]:
        """See `StageFunctions.forward`."""
        given = [*bound.forward, *inputs, *microbatch.tensors]
        inputs.clear()
        made = self._forward(given)
        return self._produced(made[: self._num_outputs]), Residuals(bound, made[self._num_outputs :])

    def backward(self, residuals: Residuals, cotangents: list[Tensor], sums: Accumulators) -> list[Tensor]:
        """See `StageFunctions.backward`."""
        bound, values = residuals
        totals = sums.sums
        given = [*bound.backward, *values, *cotangents, *self._seed, *[totals[number] for number in self._backward_adds]]
        values.clear()
        cotangents.clear()
        return self._dense(self._backward(given))

    def backward_input(
        self, residuals: Residuals, cotangents: list[Tensor], sums: Accumulators
    ) -> tuple[list[Tensor], Residuals]:
        """See `StageFunctions.backward_input`."""
        bound, values = residuals
        totals = sums.sums
        if self._backward_input is None:
            return self._dense([]), Residuals(bound, [*values, *cotangents, *self._seed])
        given = [*bound.backward_input, *values, *cotangents, *self._seed]
        given += [totals[number] for number in self._input_adds]
        values.clear()
        cotangents.clear()
        made = self._backward_input(given)
        count = self._num_input_grads
        return self._dense(made[:count]), Residuals(bound, made[count:])

    def backward_weight(self, weight_residuals: Residuals, sums: Accumulators) -> None:
        """See `StageFunctions.backward_weight`."""
        bound, values = weight_residuals
        totals = sums.sums
        given = [*bound.backward_weight, *values, *[totals[number] for number in self._weight_adds]]
        values.clear()
        self._backward_weight(given)

    def _produced(self, made: list[Tensor]) -> Produced:
        if not self._with_loss:
            return Produced(made)
        total, weight, *aux = made
        if self.joint.aux_spec is None:
            return Produced([], total, weight, None)
        remaining = iter(aux)
        leaves = [next(remaining) if leaf is TENSOR else leaf for leaf in self.joint.aux_constants]
        return Produced([], total, weight, tree.from_leaves(leaves, self.joint.aux_spec))

    def _dense(self, grads: list[Tensor]) -> list[Tensor]:
        """Zeros for inputs that the outputs do not depend on."""
        if self._num_input_grads == len(self._input_grads):
            return grads
        remaining = iter(grads)
        return [
            torch.zeros_like(_empty(like)) if node is None else next(remaining)
            for node, like in zip(self._input_grads, self._input_likes, strict=True)
        ]


def _empty(node: Any) -> Tensor:
    """A real tensor of a node's shape, dtype and device."""
    value = node.meta["val"]
    return torch.empty(value.shape, dtype=value.dtype, device=value.device)


def _attributes(joint: Joint) -> dict[str, Any]:
    """The constants that the stage's function made while it was traced."""
    return {
        str(node.target): getattr(joint.module, str(node.target)) for node in joint.graph.nodes if node.op == "get_attr"
    }

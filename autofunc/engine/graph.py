"""The graph engine: each stage captured once, and run as four plain functions of tensors, without autograd."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autofunc import tree
from autofunc.engine.capture import TENSOR, Joint, capture
from autofunc.engine.emit import Runnable, emit
from autofunc.engine.functions import Accumulators, Produced, StageContext
from autofunc.engine.partition import Piece, partition


class Residuals(NamedTuple):
    """What one microbatch keeps between two pieces. `values` is emptied by the piece that uses them."""

    params: list[Tensor]
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
        stage, self._with_loss = context.stage, context.with_loss
        joint = capture(context)
        pieces = partition(joint)
        self.joint, self.pieces = joint, pieces
        order, attributes = list(joint.graph.nodes), _attributes(joint)

        def compiled(piece: Piece, name: str) -> Runnable:
            return emit(piece, order, attributes, f"stage_{stage.index}_{name}")

        self._forward = compiled(pieces.forward, "forward")
        self._evaluate = compiled(pieces.evaluate, "evaluate")
        self._backward = compiled(pieces.backward, "backward")
        self._backward_weight = compiled(pieces.backward_weight, "backward_weight")
        self._backward_input = compiled(pieces.backward_input, "backward_input") if pieces.backward_input else None
        self._num_outputs = len(joint.outputs)
        self._input_grads = joint.input_grads
        self._input_likes = [node for node, wanted in zip(joint.inputs, context.input_wants, strict=True) if wanted]
        self._seed = [torch.ones_like(_empty(node)) for node in joint.cotangents] if context.with_loss else []

    def bind(self, leaves: list[Tensor]) -> list[Tensor]:
        """The parameters, as they are."""
        return [leaf.detach() for leaf in leaves]

    def evaluate(self, bound: list[Tensor], inputs: list[Tensor], microbatch: Mapping[str, Any]) -> Produced:
        """See `StageFunctions.evaluate`."""
        return self._produced(self._evaluate([*bound, *inputs, *_tensors(microbatch)]))

    def forward(
        self, bound: list[Tensor], inputs: list[Tensor], microbatch: Mapping[str, Any]
    ) -> tuple[Produced, Residuals]:
        """See `StageFunctions.forward`."""
        given = [*bound, *inputs, *_tensors(microbatch)]
        inputs.clear()
        made = self._forward(given)
        return self._produced(made[: self._num_outputs]), Residuals(bound, made[self._num_outputs :])

    def backward(self, residuals: Residuals, cotangents: list[Tensor], sums: Accumulators) -> list[Tensor]:
        """See `StageFunctions.backward`."""
        cotangents += self._seed
        return self._dense(self._backward(self._given(self.pieces.backward, residuals, cotangents, sums)))

    def backward_input(
        self, residuals: Residuals, cotangents: list[Tensor], sums: Accumulators
    ) -> tuple[list[Tensor], Residuals]:
        """See `StageFunctions.backward_input`."""
        if self._backward_input is None:
            values = [*residuals.values, *cotangents, *self._seed]
            return self._dense([]), Residuals(residuals.params, values)
        assert self.pieces.backward_input is not None
        cotangents += self._seed
        made = self._backward_input(self._given(self.pieces.backward_input, residuals, cotangents, sums))
        count = len(made) - len(self.pieces.kept)
        return self._dense(made[:count]), Residuals(residuals.params, made[count:])

    def backward_weight(self, weight_residuals: Residuals, sums: Accumulators) -> None:
        """See `StageFunctions.backward_weight`."""
        self._backward_weight(self._given(self.pieces.backward_weight, weight_residuals, [], sums))

    def _given(self, piece: Piece, residuals: Residuals, cotangents: list[Tensor], sums: Accumulators) -> list[Tensor]:
        """A piece's arguments; what they are taken from lets go of them."""
        params = residuals.params
        given = [params[number] for number in piece.params]
        given += residuals.values
        given += cotangents
        residuals.values.clear()
        cotangents.clear()
        given += sums.of([number for number, _ in piece.adds])
        return given

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
        if len(grads) == len(self._input_grads):
            return grads
        remaining = iter(grads)
        return [
            torch.zeros_like(_empty(like)) if node is None else next(remaining)
            for node, like in zip(self._input_grads, self._input_likes, strict=True)
        ]


def _tensors(microbatch: Mapping[str, Any]) -> list[Tensor]:
    return [leaf for leaf in tree.leaves_and_spec(dict(microbatch))[0] if isinstance(leaf, Tensor)]


def _empty(node: Any) -> Tensor:
    """A real tensor of a node's shape, dtype and device."""
    value = node.meta["val"]
    return torch.empty(value.shape, dtype=value.dtype, device=value.device)


def _attributes(joint: Joint) -> dict[str, Any]:
    """The constants that the stage's function made while it was traced."""
    return {
        str(node.target): getattr(joint.module, str(node.target)) for node in joint.graph.nodes if node.op == "get_attr"
    }

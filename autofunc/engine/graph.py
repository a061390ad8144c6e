"""The graph engine: each stage captured once, and run as four plain functions of tensors, without autograd."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from autofunc.engine.capture import Joint
from autofunc.engine.compile import compile_piece
from autofunc.engine.donation import donated
from autofunc.engine.emit import Interleaved, Runnable, emit, emit_interleaved
from autofunc.engine.footprint import footprint
from autofunc.engine.functions import Accumulators, Microbatch, Produced
from autofunc.engine.partition import Piece, in_order, partition
from autofunc.engine.residuals import KEEP_ALL, Keep, cost_of, early_gradients, recomputed
from autofunc.schedule import Kind
from autofunc.splitting import Ready, StageContext

COMPUTATIONS = frozenset((Kind.F, Kind.B, Kind.I, Kind.W))
Node = fx.Node


class PieceParameters(NamedTuple):
    """A stage's parameters, as each piece takes them, in its order."""

    forward: list[Tensor]
    backward: list[Tensor]
    backward_input: list[Tensor]
    backward_weight: list[Tensor]
    ready: list[Ready]  # the forward's last argument if parameters arrive layer by layer; else empty


class KeptTensors(NamedTuple):
    """The residuals of one microbatch, for B, `I` or W. `values` is emptied by the piece that uses them."""

    bound: PieceParameters
    values: list[Tensor]


class BackwardPiece(NamedTuple):
    """B, `I` or W of a stage, ready to run."""

    run: Runnable
    adds: list[int]  # accumulators that it adds to, as indices of trainable holders

    def __call__(
        self, params: list[Tensor], values: list[Tensor], cotangents: list[Tensor], totals: list[Tensor]
    ) -> Sequence[Tensor]:  # fmt: skip
        """Run the piece; empties `values` and `cotangents`.

        Args:
            params: the parameters it takes, in its order.
            values: residuals kept by the previous piece.
            cotangents: of the stage's outputs, or the seed of its loss.
            totals: all accumulators of the stage.
        """
        return self.run(_given_to(self.adds, params, values, cotangents, totals))


def _given_to(
    adds: Sequence[int], params: list[Tensor], values: list[Tensor], cotangents: list[Tensor], totals: list[Tensor]
) -> list[Tensor]:
    """Collect the arguments of a backward's function, in its order."""
    given = [*params, *values, *cotangents, *[totals[number] for number in adds]]
    values.clear()
    cotangents.clear()
    return given


class GraphStage:
    """Implements `StageFunctions` by graphs partitioned ahead of time.

    `backward` and `backward_weight` add to the accumulators themselves. Residuals, cotangents and received values are
    freed at their last use. For a first stage, which has no input gradient, `backward_input` is empty and
    `backward_weight` is the whole backward.

    Args:
        joint: the captured stage, see `capture`.
        context: the stage.
        keep: what is kept between the pieces.
        compiled: run the pieces as compiled code.
    """

    def __init__(
        self, joint: Joint, context: StageContext, keep: Keep = KEEP_ALL, *, compiled: bool = False
    ) -> None:  # fmt: skip
        self._with_loss, self._with_grads, self._compiled = context.with_loss, context.with_grads, compiled
        self._donated: Mapping[Node, Any] = {}
        if context.keeps_state and not context.with_grads:
            joint, self._donated = donated(joint)
        pieces = partition(joint, recomputed(joint, keep, compiled=compiled), early_gradients(joint, keep))
        self.joint, self.pieces = joint, pieces
        self.bytes, self.exact_bytes = footprint(joint, pieces, context)
        self._order, self._attributes = list(joint.graph.nodes), _attributes(joint)
        stage = context.stage
        self._title, self._index = stage.title, stage.index
        number_of = {name: number for number, name in enumerate(stage.layers)}
        layers = [number_of[stage.model.layer_of(path) or ""] for path in stage.holders]
        self._arrivals = dict(zip(joint.params, layers, strict=True)) if context.setting.arrive_by_layer else {}
        self._made: set[Kind] = set()
        self._forward: Runnable = _not_made
        self._evaluate: Runnable = _not_made
        self._backward = self._backward_input = self._backward_weight = BackwardPiece(_not_made, [])
        self._num_outputs, self._num_states = len(joint.outputs), len(joint.new_states)
        self._input_grads = joint.input_grads
        handed_on = (*joint.outputs, *joint.new_states, *joint.input_grads)
        self._handed_on = frozenset(node for node in handed_on if node is not None)
        self._num_input_grads = sum(node is not None for node in joint.input_grads)
        self._input_likes = [node for node, wanted in zip(joint.inputs, context.input_wants, strict=True) if wanted]
        self._seed = [torch.ones_like(_empty(node)) for node in joint.cotangents] if context.with_loss else []
        self.constants = [*self._attributes.values(), *self._seed]
        self.terms = joint.terms

    def make(self, kinds: Iterable[Kind]) -> None:
        """Make the pieces that these actions run, if not made yet.

        Raises:
            ModelError: if a piece cannot be compiled.
        """
        pieces = self.pieces
        for kind in set(kinds) - self._made:
            if kind is Kind.F and self._with_grads:
                self._forward = self._runnable(pieces.forward, "forward", self._arrivals)
            elif kind is Kind.F:
                self._evaluate = self._runnable(pieces.evaluate, "evaluate", self._arrivals)
            elif kind is Kind.B:
                self._backward = self._backward_piece(pieces.backward, "backward")
            elif kind is Kind.I and pieces.backward_input is not None:
                self._backward_input = self._backward_piece(pieces.backward_input, "backward_input")
            elif kind is Kind.W:
                self._backward_weight = self._backward_piece(pieces.backward_weight, "backward_weight")
            self._made.add(kind)

    def _backward_piece(self, piece: Piece, name: str) -> BackwardPiece:
        return BackwardPiece(self._runnable(piece, name), [number for number, _ in piece.adds])

    def _runnable(self, piece: Piece, name: str, arrivals: Mapping[Node, int] | None = None) -> Runnable:
        """Make a piece a function; `arrivals` names the parameters it waits for."""
        arrivals = arrivals or {}
        if self._compiled:
            call = compile_piece(piece, self._order, self._attributes, f"{name} of {self._title}")
            return _after(sorted(set(arrivals.values())), call) if arrivals else call
        return emit(
            piece, self._order, self._attributes, f"stage_{self._index}_{name}", whole=self._handed_on, arrivals=arrivals,
            donated=self._donated,
        )  # fmt: skip

    @property
    def work(self) -> tuple[float, float, float]:
        """Cost of F, `I` and W, in bytes read or written, see `residuals.cost_of`."""
        pieces = (self.pieces.forward, self.pieces.backward_input, self.pieces.backward_weight)
        f, i, w = (cost_of(in_order(piece, self._order)) if piece is not None else 0.0 for piece in pieces)
        return f, i, w

    def bind(self, leaves: list[Tensor], ready: Ready | None = None) -> PieceParameters:
        """Sort the stage's parameters by the pieces that take them; they share memory with `leaves`."""
        leaves = [leaf.detach() for leaf in leaves]
        pieces = self.pieces
        forward, backward, backward_input, backward_weight = (
            [leaves[number] for number in piece.params] if piece is not None else []
            for piece in (pieces.forward, pieces.backward, pieces.backward_input, pieces.backward_weight)
        )
        waits = [ready] if ready is not None and self._arrivals else []
        return PieceParameters(forward, backward, backward_input, backward_weight, waits)

    def evaluate(
        self, bound: PieceParameters, state: Sequence[Tensor], inputs: list[Tensor], microbatch: Microbatch
    ) -> Produced:
        """See `StageFunctions.evaluate`."""
        made = self._evaluate([*bound.forward, *state, *inputs, *microbatch.tensors, *bound.ready])
        return self._produced(made[: self._num_outputs], made[self._num_outputs :])

    def forward(
        self, bound: PieceParameters, state: Sequence[Tensor], inputs: list[Tensor], microbatch: Microbatch
    ) -> tuple[Produced, KeptTensors]:
        """See `StageFunctions.forward`."""
        return self._kept(bound, self._forward(_given_to_forward(bound, state, inputs, microbatch)))

    def _kept(self, bound: PieceParameters, made: Sequence[Tensor]) -> tuple[Produced, KeptTensors]:
        outputs, kept = self._num_outputs, self._num_outputs + self._num_states
        return self._produced(made[:outputs], made[outputs:kept]), KeptTensors(bound, [*made[kept:]])

    def backward(self, residuals: KeptTensors, cotangents: list[Tensor], sums: Accumulators) -> list[Tensor]:
        """See `StageFunctions.backward`."""
        bound, values = residuals
        return self._dense(self._backward(bound.backward, values, self._seeded(cotangents), sums.sums))

    def backward_input(
        self, residuals: KeptTensors, cotangents: list[Tensor], sums: Accumulators
    ) -> tuple[list[Tensor], KeptTensors]:
        """See `StageFunctions.backward_input`."""
        bound, values = residuals
        totals = sums.sums  # allocated from the first backward on, even if I adds nothing
        if self.pieces.backward_input is None:
            return self._dense([]), KeptTensors(bound, [*values, *self._seeded(cotangents)])
        made = self._backward_input(bound.backward_input, values, self._seeded(cotangents), totals)
        count = self._num_input_grads
        return self._dense(made[:count]), KeptTensors(bound, [*made[count:]])

    def backward_weight(self, weight_residuals: KeptTensors, sums: Accumulators) -> None:
        """See `StageFunctions.backward_weight`."""
        bound, values = weight_residuals
        self._backward_weight(bound.backward_weight, values, [], sums.sums)

    # --- interleaved with another stage, see `overlap.py`

    @property
    def forward_nodes(self) -> list[Node]:
        """The nodes that the forward computes, in order."""
        return in_order(self.pieces.forward, self._order)

    @property
    def backward_nodes(self) -> list[Node]:
        """The nodes that the full backward computes, in order."""
        return in_order(self.pieces.backward, self._order)

    def interleaved(self, piece: Piece, stops: Sequence[int], name: str) -> Interleaved:
        """Make a piece a generator that stops before the nodes with the given indices."""
        arrivals = self._arrivals if piece is self.pieces.forward else {}
        return emit_interleaved(
            piece, self._order, self._attributes, f"stage_{self._index}_{name}", stops, whole=self._handed_on,
            arrivals=arrivals,
        )  # fmt: skip

    def forward_interleaved(
        self,
        run: Interleaved,
        bound: PieceParameters,
        state: Sequence[Tensor],
        inputs: list[Tensor],
        microbatch: Microbatch,
    ) -> Generator[bool | None, None, tuple[Produced, KeptTensors]]:
        """Run `forward` as `interleaved` made it."""
        return self._kept(bound, (yield from run(_given_to_forward(bound, state, inputs, microbatch))))

    def backward_interleaved(
        self, run: Interleaved, residuals: KeptTensors, cotangents: list[Tensor], sums: Accumulators
    ) -> Generator[bool | None, None, list[Tensor]]:
        """Run `backward` as `interleaved` made it."""
        (bound, values), adds = residuals, [number for number, _ in self.pieces.backward.adds]
        given = _given_to(adds, bound.backward, values, self._seeded(cotangents), sums.sums)
        return self._dense((yield from run(given)))

    def _seeded(self, cotangents: list[Tensor]) -> list[Tensor]:
        """Return what the backward starts from: 1 for the loss in a stage that ends in it, else the cotangents."""
        return [*self._seed] if self._with_loss else cotangents

    def _produced(self, made: Sequence[Tensor], state: Sequence[Tensor] = ()) -> Produced:
        if not self._with_loss:
            return Produced([*made], state=state)
        total, weight, *aux = made
        described = self.joint.returned.aux
        return Produced([], total, weight, described.assemble(aux) if described is not None else None, state)

    def _dense(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Fill in zeros for inputs that the outputs do not depend on."""
        if self._num_input_grads == len(self._input_grads):
            return [*grads]
        remaining = iter(grads)
        return [
            torch.zeros_like(_empty(like)) if node is None else next(remaining)
            for node, like in zip(self._input_grads, self._input_likes, strict=True)
        ]


def _given_to_forward(
    bound: PieceParameters, state: Sequence[Tensor], inputs: list[Tensor], microbatch: Microbatch
) -> list[Any]:
    given: list[Any] = [*bound.forward, *state, *inputs, *microbatch.tensors, *bound.ready]
    inputs.clear()
    return given


def _after(layers: Sequence[int], call: Runnable) -> Runnable:
    """Make a compiled forward wait for all its parameters first: it cannot wait in between."""

    def waiting(given: list[Any]) -> Sequence[Tensor]:
        ready = given.pop()
        for layer in layers:
            ready(layer)
        return call(given)

    return waiting


def _not_made(given: list[Tensor]) -> Sequence[Tensor]:
    raise AssertionError("this piece was not requested when the stage was made")


def _empty(node: Any) -> Tensor:
    """Allocate a real tensor of a node's shape, dtype and device."""
    value = node.meta["val"]
    return torch.empty(value.shape, dtype=value.dtype, device=value.device)


def _attributes(joint: Joint) -> dict[str, Any]:
    """Return the constants that the stage's function made while it was traced."""
    return {
        str(node.target): getattr(joint.module, str(node.target)) for node in joint.graph.nodes if node.op == "get_attr"
    }

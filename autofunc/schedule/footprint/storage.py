"""Which values of a stage share memory, so that exact figures of live bytes count them once.

Besides memory of their own, a stage's residuals hold values it received (the input of its first matrix product) and
values it passes on. On one rank a value has one storage, however many hold it: an activation handed from one stage to the
next in place is held by both stages' residuals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autofunc.schedule.effects import Activation, BackwardResiduals, Cotangent, Edge, Token

Storage = tuple[str, int, int, int]
"""(what it holds, stage, number of the value, microbatch)."""


@dataclass(frozen=True)
class StageBytes:
    """Bytes of one microbatch at one stage. Tuples hold one entry per value, in the order of the stage's boundaries.

    Args:
        outputs: of each value passed on.
        cotangents: of the gradient of each output that needs one.
        residuals: what F keeps for B or I, besides the values of `kept_inputs` and `kept_outputs`.
        weight_residuals: what `I` keeps for W, besides the values named below.
        accumulators: the stage's gradients, from its first backward to the end of the step; once for all microbatches.
        kept_inputs: indices of the received values that F keeps for B or I.
        kept_outputs: indices of its outputs that F keeps.
        weight_inputs: indices of the received values that `I` keeps for W.
        weight_outputs: indices of its outputs that `I` keeps for W.
        weight_cotangents: indices of the received cotangents that `I` keeps for W.
        weight_input_grads: indices of the cotangents it sends back that `I` keeps for W.
    """

    outputs: tuple[int, ...]
    cotangents: tuple[int, ...]
    residuals: int
    weight_residuals: int
    accumulators: int
    kept_inputs: tuple[int, ...] = ()
    kept_outputs: tuple[int, ...] = ()
    weight_inputs: tuple[int, ...] = ()
    weight_outputs: tuple[int, ...] = ()
    weight_cotangents: tuple[int, ...] = ()
    weight_input_grads: tuple[int, ...] = ()


class TokenStorages:
    """The storages behind tokens, and their sizes.

    Args:
        stages: one per stage.
        edges: connections between stages.
    """

    def __init__(self, stages: Sequence[StageBytes], edges: Sequence[Edge]) -> None:
        self._stages = stages
        self._producer = {edge.consumer: edge.producer for edge in edges}

    def of(self, token: Token) -> list[tuple[Storage, int]]:
        """Return (storage, bytes) of everything that a token holds on its rank."""
        microbatch = token.microbatch
        if isinstance(token, Activation):
            return self._values("activation", token.source, microbatch)
        if isinstance(token, Cotangent):
            return self._values("cotangent", token.target, microbatch)
        stage, mine = token.stage, self._stages[token.stage]
        if isinstance(token, BackwardResiduals):
            own: list[tuple[Storage, int]] = [(("residuals", stage, 0, microbatch), mine.residuals)]
            inputs, outputs = mine.kept_inputs, mine.kept_outputs
        else:
            own = [(("weight residuals", stage, 0, microbatch), mine.weight_residuals)]
            inputs, outputs = mine.weight_inputs, mine.weight_outputs
            own += self._values("cotangent", stage, microbatch, mine.weight_cotangents)
            if mine.weight_input_grads:
                own += self._values("cotangent", self._producer[stage], microbatch, mine.weight_input_grads)
        if inputs:
            own += self._values("activation", self._producer[stage], microbatch, inputs)
        return own + self._values("activation", stage, microbatch, outputs)

    def _values(
        self, what: str, producer: int, microbatch: int, numbers: Sequence[int] | None = None
    ) -> list[tuple[Storage, int]]:
        stage = self._stages[producer]
        sizes = stage.outputs if what == "activation" else stage.cotangents
        return [
            ((what, producer, number, microbatch), sizes[number])
            for number in (range(len(sizes)) if numbers is None else numbers)
        ]

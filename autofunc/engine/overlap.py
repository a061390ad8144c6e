"""A forward and a backward interleaved as one program: while ranks exchange values for one, the other computes.

Each runs the same operators in the same order as alone, so their numbers do not change. Neither needs the other's values.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

from torch import Tensor

from autofunc.engine.functions import Accumulators, Microbatch, Produced
from autofunc.engine.graph import GraphStage, KeptTensors, PieceParameters
from autofunc.engine.turns import turns_of

Steps = Generator[bool | None, None, Any]
"""See `emit.Interleaved`."""


class Overlapped:
    """A pair of stages: one runs a forward and the other a backward, each for its own microbatch.

    Args:
        forward: the stage whose forward runs.
        backward: the stage whose backward runs; may be the same.
    """

    def __init__(self, forward: GraphStage, backward: GraphStage) -> None:
        self._forward, self._backward = forward, backward
        (f, b), self._backward_begins = turns_of(forward.forward_nodes, backward.backward_nodes)
        self._run_forward = forward.interleaved(forward.pieces.forward, f, "forward_interleaved")
        self._run_backward = backward.interleaved(backward.pieces.backward, b, "backward_interleaved")

    def __call__(
        self, forward: tuple[PieceParameters, Sequence[Tensor], list[Tensor], Microbatch],
        backward: tuple[KeptTensors, list[Tensor], Accumulators], on_turn: Callable[[int, bool], None],
    ) -> tuple[tuple[Produced, KeptTensors], list[Tensor]]:  # fmt: skip
        """Run both.

        Args:
            forward: arguments of `StageFunctions.forward`.
            backward: arguments of `StageFunctions.backward`.
            on_turn: called at the start of each turn with 0 for the forward or 1 for the backward, and whether it waits:
                each wait is a separate turn.

        Returns:
            What the two functions return.
        """
        f = self._forward.forward_interleaved(self._run_forward, *forward)
        b = self._backward.backward_interleaved(self._run_backward, *backward)
        made = run_interleaved((f, b), self._backward_begins, on_turn)
        return made[0], made[1]


def run_interleaved(
    both: tuple[Steps, Steps], second_begins: bool, on_turn: Callable[[int, bool], None]
) -> list[Any]:  # fmt: skip
    """Run two generators alternately, each until it stops, or to its end once the other has ended; return their results."""
    made: list[Any] = [None, None]
    left, now, waits = {0, 1}, int(second_begins), False
    while left:
        on_turn(now, waits)
        try:
            yielded = next(both[now])
        except StopIteration as ended:
            made[now], yielded = ended.value, None
            left.remove(now)
        waits = bool(yielded)
        if yielded is None and 1 - now in left:
            now = 1 - now
    return made

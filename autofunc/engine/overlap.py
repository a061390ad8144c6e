"""A forward and a backward of two stages as one program: while ranks exchange what one needs, the other computes.

Both run what they run alone, in the same order, so their numbers are the same. Neither needs anything of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

from torch import Tensor

from autofunc.engine.functions import Accumulators, Microbatch, Produced
from autofunc.engine.graph import GraphStage, KeptTensors, PieceParameters
from autofunc.engine.turns import turns_of

Turning = Generator[bool | None, None, Any]
"""See `emit.InTurns`."""


class Overlapped:
    """A pair of stages, of which one runs forward and the other backward, each for a microbatch of its own.

    Args:
        forward: whose forward runs.
        backward: whose backward runs; it may be the same stage.
    """

    def __init__(self, forward: GraphStage, backward: GraphStage) -> None:
        self._forward, self._backward = forward, backward
        (f, b), self._backward_begins = turns_of(forward.forward_nodes, backward.backward_nodes)
        self._run_forward = forward.in_turns(forward.pieces.forward, f, "forward_in_turns")
        self._run_backward = backward.in_turns(backward.pieces.backward, b, "backward_in_turns")

    def __call__(
        self, forward: tuple[PieceParameters, Sequence[Tensor], list[Tensor], Microbatch],
        backward: tuple[KeptTensors, list[Tensor], Accumulators], told: Callable[[int, bool], None],
    ) -> tuple[tuple[Produced, KeptTensors], list[Tensor]]:  # fmt: skip
        """Run both.

        Args:
            forward: what `StageFunctions.forward` takes.
            backward: what `StageFunctions.backward` takes.
            told: called at the beginning of each turn, with 0 for the forward and 1 for the backward, and whether it waits:
                each time that it begins or ends to wait is a turn by itself.

        Returns:
            What these give.
        """
        f = self._forward.forward_in_turns(self._run_forward, *forward)
        b = self._backward.backward_in_turns(self._run_backward, *backward)
        made = taking_turns((f, b), self._backward_begins, told)
        return made[0], made[1]


def taking_turns(
    both: tuple[Turning, Turning], second_begins: bool, told: Callable[[int, bool], None]
) -> list[Any]:  # fmt: skip
    """What two generators return that are run in turns, each until it stops; when one has ended, the other to its end."""
    made: list[Any] = [None, None]
    left, now, waits = {0, 1}, int(second_begins), False
    while left:
        told(now, waits)
        try:
            said = next(both[now])
        except StopIteration as ended:
            made[now], said = ended.value, None
            left.remove(now)
        waits = bool(said)
        if said is None and 1 - now in left:
            now = 1 - now
    return made

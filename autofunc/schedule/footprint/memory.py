"""Rough figures of what one microbatch keeps alive: enough for a search, and easy to write by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autofunc.errors import ScheduleError
from autofunc.schedule.effects import BackwardResiduals, Edge, WeightResiduals, chain
from autofunc.schedule.footprint.storage import StageBytes, TokenStorages
from autofunc.shown import quoted

PerStage = float | Sequence[float]


@dataclass(frozen=True)
class Memory:
    """Bytes of the values of one microbatch: scalars, or one value per stage.

    Args:
        residuals: what F keeps for B or I.
        weight_residuals: what `I` keeps for W.
        output: what a stage passes on, and the cotangent that comes back for it.
        accumulators: a stage's gradients, from its first backward to the end of the step.
    """

    residuals: PerStage
    weight_residuals: PerStage
    output: PerStage = 0.0
    accumulators: PerStage = 0.0

    def check(self, num_stages: int) -> None:
        """Refuse figures that do not fit a number of stages.

        Raises:
            ScheduleError: for a wrong number of values, or a negative one.
        """
        for name in ("residuals", "weight_residuals", "output", "accumulators"):
            value = np.asarray(getattr(self, name), np.float64)
            if value.ndim and value.shape != (num_stages,):
                raise ScheduleError(
                    f"Memory.{name} has shape {value.shape}; expected a number, or one for each of {num_stages} stages"
                )
            if (value < 0).any() or not np.isfinite(value).all():
                given = quoted(getattr(self, name))
                raise ScheduleError(f"Memory.{name}={given}: bytes must be finite and not negative")

    def per_stage(self, name: str, num_stages: int) -> npt.NDArray[np.float64]:
        """Return one of the fields for every stage: float64 of shape (num_stages,)."""
        return np.broadcast_to(np.asarray(getattr(self, name), np.float64), num_stages)

    def by_stage(self, num_stages: int) -> list[StageBytes]:
        """Return the same figures, stage by stage."""
        self.check(num_stages)
        names = ("output", "residuals", "weight_residuals", "accumulators")
        columns = zip(*(self.per_stage(name, num_stages).tolist() for name in names), strict=True)
        return [StageBytes((out,), (out,), *rest) for out, *rest in columns]

    @classmethod
    def of_stages(cls, stages: Sequence[StageBytes], edges: Sequence[Edge] | None = None) -> Memory:
        """Make rough figures of exact ones, for a search: residuals are charged with every value that they hold.

        Args:
            stages: one per stage.
            edges: connections between stages; a chain by default.
        """
        storages = TokenStorages(stages, chain(len(stages)) if edges is None else edges)
        kept, weight = (
            [sum(size for _, size in storages.of(token(stage, 0))) for stage in range(len(stages))]
            for token in (BackwardResiduals, WeightResiduals)
        )
        return cls(kept, weight, [sum(s.outputs) for s in stages], [s.accumulators for s in stages])

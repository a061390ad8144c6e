"""How several processes compute a model together, as far as the model decides it."""

from __future__ import annotations

from typing import Any

from autofunc.model.placement_rules import TensorParallel


class OverProcesses:
    """The part of `Model` about several processes."""

    uncut: str | None = None
    """Why no table can shard its parameters over tensor parallel ranks; None if a suitable table can."""

    uncut_with_adapters: str | None = None
    """Why its parameters cannot be sharded once it has adapters; None if they can."""

    def spread_by(self, table: TensorParallel) -> TensorParallel:
        """Return a table of this model's parameters, extended by the model's own entries."""
        return table

    def over_ranks(self, axis: str, size: int, table: Any, *, sequence: bool) -> Any:
        """Return how an axis's ranks compute this model with its own functions for several ranks, for `Model.specialise`.

        None if it has no such functions, and runs on values that carry their own placements.

        Args:
            axis: its name.
            size: number of its ranks.
            table: the user's table of placements; None lets the model decide.
            sequence: whether the stream between blocks is cut along the tokens.

        Raises:
            MeshError: if a size is not divisible.
            ModelError: for a table that does not fit.
        """
        return None

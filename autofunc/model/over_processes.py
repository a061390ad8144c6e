"""What a model says of how several processes compute it together."""

from __future__ import annotations

from typing import Any

from autofunc.model.placement_rules import TensorParallel


class OverProcesses:
    """A part of `Model`."""

    uncut: str | None = None
    """Why its parameters cannot be cut over tensor parallel ranks by any table; None: by one that fits they can."""

    uncut_with_adapters: str | None = None
    """Why they cannot once it has adapters."""

    def spread_by(self, table: TensorParallel) -> TensorParallel:
        """A table of this model's parameters with what the model adds to it."""
        return table

    def over_ranks(self, axis: str, size: int, table: Any, *, sequence: bool) -> Any:
        """How the ranks of an axis compute this model together by functions of its own, for `Model.specialise`.

        None: its functions do not know, and run on values that know how they lie.

        Args:
            axis: its name.
            size: how many ranks.
            table: how parameters are cut, in the user's words; None lets the model say.
            sequence: whether the stream between blocks is cut along the tokens.

        Raises:
            MeshError: where something does not divide.
            ModelError: for a table that does not fit.
        """
        return None

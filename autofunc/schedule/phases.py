"""The shape that 1F1B schedules share: warmup forwards, forward-backward pairs, the backwards that are left."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from autofunc.schedule.ir import Kind, Table, compute_table

Columns = npt.NDArray[np.int64]
"""int64 array of shape (number of actions, 2): stage, microbatch."""


def alternate(forwards: Columns, backwards: Columns, warmup: int) -> Table:
    """Run `warmup` forwards, then one forward and one backward in turn, then the remaining backwards.

    Args:
        forwards: in order.
        backwards: in order, as many.
        warmup: cut to the number of forwards.
    """
    warmup = min(warmup, len(forwards))
    steady = len(forwards) - warmup
    pairs = np.stack((forwards[warmup:], backwards[:steady]), axis=1).reshape(-1, 2)
    columns = np.concatenate((forwards[:warmup], pairs, backwards[steady:]))
    kind = np.concatenate((np.full(warmup, Kind.F), np.tile((Kind.F, Kind.B), steady), np.full(warmup, Kind.B)))
    return compute_table(columns[:, 0], kind, columns[:, 1])

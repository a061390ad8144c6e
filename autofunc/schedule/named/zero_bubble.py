"""The rows that zero-bubble schedules share: 1F1B on the input gradients, with the weight gradients some way behind.

Source: Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024, section 2.1 (arXiv 2401.10241).
"""

from __future__ import annotations

import numpy as np

from autofunc.schedule.ir import Kind, Table, compute_table
from autofunc.schedule.named.phases import Columns


def delayed_weight_row(forwards: Columns, backwards: Columns, warmup: int, delay: int) -> Table:
    """Warmup forwards; then F, I and the W that is `delay` backwards behind; then the W that are left.

    A rank holds `warmup + 1 + delay` activations at most: what an early rank holds for its warmup, a late one may hold for
    its delayed W, which fill the bubble at the end.

    Args:
        forwards: (stage, microbatch) in order.
        backwards: in order, as many.
        warmup: cut to the number of forwards.
        delay: how many backwards W follows I.
    """
    count = len(forwards)
    number = np.arange(count)
    # when each action's turn comes: pairs F, I in steps of three, with the delayed W in between
    turns = np.concatenate((3 * (number - min(warmup, count)), 3 * number + 1, 3 * (number + delay) + 2))
    order = np.argsort(turns, kind="stable")
    columns = np.concatenate((forwards, backwards, backwards))[order]
    return compute_table(columns[:, 0], np.repeat((Kind.F, Kind.I, Kind.W), count)[order], columns[:, 1])

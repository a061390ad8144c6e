"""The rows that ZB-H1 and ZB-H2 share: 1F1B on the input gradients, with the weight gradients some way behind.

Source: Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024, section 2.1 (arXiv 2401.10241).
"""

from __future__ import annotations

from autofunc.schedule.ir import Action, Kind, Table, as_table


def delayed_weight_row(rank: int, num_microbatches: int, warmup: int, delay: int) -> Table:
    """Warmup forwards; then F, I and the W of the microbatch `delay` before; then the W that are left.

    A rank holds `warmup + 1 + delay` activations at most: what an early rank holds for its warmup, a late one may hold for
    its delayed W, which fill the bubble at the end.
    """
    warmup = min(warmup, num_microbatches)
    actions = [Action(rank, Kind.F, microbatch) for microbatch in range(warmup)]
    for microbatch in range(num_microbatches):
        if warmup + microbatch < num_microbatches:
            actions.append(Action(rank, Kind.F, warmup + microbatch))
        actions.append(Action(rank, Kind.I, microbatch))
        if microbatch >= delay:
            actions.append(Action(rank, Kind.W, microbatch - delay))
    left = range(max(num_microbatches - delay, 0), num_microbatches)
    return as_table([*actions, *(Action(rank, Kind.W, microbatch) for microbatch in left)])

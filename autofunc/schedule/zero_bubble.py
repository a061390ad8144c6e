"""The rows that zero-bubble schedules share: 1F1B on the input gradients, with the weight gradients some way behind.

Source: Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024, section 2.1 (arXiv 2401.10241).
"""

from __future__ import annotations

from autofunc.schedule.ir import Action, Kind, Table, as_table
from autofunc.schedule.phases import Columns


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
    run_f = [Action(stage, Kind.F, microbatch) for stage, microbatch in forwards.tolist()]
    run_i = [Action(stage, Kind.I, microbatch) for stage, microbatch in backwards.tolist()]
    run_w = [action._replace(kind=Kind.W) for action in run_i]
    actions = run_f[:warmup]
    for position, action in enumerate(run_i):
        actions += run_f[warmup + position : warmup + position + 1]
        actions.append(action)
        if position >= delay:
            actions.append(run_w[position - delay])
    return as_table([*actions, *run_w[max(len(run_w) - delay, 0) :]])

"""ZB-V: zero bubble at the memory of 1F1B, two stages a rank in a V.

Source: Qi et al., "Zero Bubble Pipeline Parallelism", arXiv 2401.10241 (v2 on), section 6, and the same phases in PyTorch,
`torch/distributed/pipelining/schedules.py`, ScheduleZBVZeroBubble. With F = I = W no rank idles between its first
action and its last, and every rank holds `num_ranks` microbatches at most (in stage activations, twice as many). The
construction fills the pipeline with 2p - 1 microbatches; with fewer, what is not there is left out.
"""

from __future__ import annotations

from autofunc.schedule.ir import Table
from autofunc.schedule.named.script import Script


def row(rank: int, num_ranks: int, num_microbatches: int) -> Table:
    """The actions of one rank, which holds the stages `rank` and `2 * num_ranks - 1 - rank`."""
    script = Script(rank, num_ranks)
    down, up = script.down, script.up
    count = max(num_microbatches, 2 * num_ranks - 1)
    above, below = rank, num_ranks - rank  # ranks nearer to the first stage; this one and those nearer to the turn

    for _ in range(2 * below - 1):
        script.forward(down)
    for _ in range(above):
        script.forward(up)
        script.forward(down)
    for _ in range(below):
        script.forward(up)
        script.backward_input(up)
        script.backward_weight()
    for _ in range(count - num_ranks):
        if script.count(down) < count:
            script.forward(down)
        script.backward_input(down)
        script.backward_weight()
        script.forward(up)
        script.backward_input(up)
        script.backward_weight()
    for _ in range(above):
        script.backward_input(down)
        script.backward_input(up)
    for _ in range(below):
        script.backward_input(down)
        script.backward_weight(down)
    for stage in [up] * above + [down] * above:
        script.backward_weight(stage)
    return script.table(num_microbatches)

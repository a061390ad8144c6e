"""DualPipeV: forwards of one half of a V beside backwards of the other.

Source: DeepSeek-AI, DualPipe repository, `dualpipe/dualpipev.py` ("cut in half" of DualPipe, DeepSeek-V3 technical report,
arXiv 2412.19437, section 3.2.1), whose eight steps these are. A pair `(0F4;3B0)OVERLAP_F_B` may run at once, for instance
one's communication beside the other's computation; where nothing overlaps, its two parts run one after the other.
"""

from __future__ import annotations

from autofunc.schedule.ir import Table
from autofunc.schedule.named.script import Script


def row(rank: int, num_ranks: int, num_microbatches: int) -> Table:
    """The actions of one rank, which holds the stages `rank` and `2 * num_ranks - 1 - rank`."""
    script = Script(rank, num_ranks)
    down, up = script.down, script.up
    above, below = rank + 1, num_ranks - 1 - rank  # this rank and those nearer to the first stage; those nearer to the turn

    for _ in range(2 * below):
        script.forward(down)
    for _ in range(above):
        script.forward(down)
        script.forward(up)
    for _ in range(below):
        script.backward_input(up)
        script.backward_weight()
        script.forward(up)
    for step in range(num_microbatches - 2 * num_ranks + above):
        # at the turn the first pair waits for its own forward: not overlapped, the bubble is smaller
        script.forward(down, overlapped=step > 0 or rank < num_ranks - 1)
        script.backward(up)
        script.forward(up, overlapped=True)
        script.backward(down)
    for _ in range(below):
        script.backward(up)
        script.forward(up, overlapped=True)
        script.backward(down)
    for step in range(2 * above):  # the second half leaves its weight gradients for the bubbles at the end
        stage = down if step % 2 else up
        run = script.backward if step < above else script.backward_input
        run(stage)
    for _ in range(below):
        script.backward_weight()
        script.backward_input(down)
    for _ in range(above):
        script.backward_weight()
    return script.table(num_microbatches)

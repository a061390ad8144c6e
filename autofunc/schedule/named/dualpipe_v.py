"""DualPipeV: forwards of one leg of a V beside backwards of the other.

Source: DeepSeek-AI, DualPipe repository, `dualpipe/dualpipev.py` ("cut in half" of DualPipe, DeepSeek-V3 technical report,
arXiv 2412.19437, section 3.2.1), whose eight steps the phases follow. A pair `(0F4;3B0)OVERLAP_F_B` may run at once, for
instance the communication of one beside the computation of the other; otherwise its two parts run one after the other.
"""

from __future__ import annotations

from autofunc.schedule.ir import Table
from autofunc.schedule.named.script import WAITING, passes_of, scripted


def row(rank: int, num_ranks: int, num_microbatches: int) -> Table:
    """The actions of one rank, which holds the stages `rank` and `2 * num_ranks - 1 - rank`."""
    f_down, b_down, i_down, _ = passes_of(rank)
    f_up, b_up, i_up, _ = passes_of(2 * num_ranks - 1 - rank)
    *_, w = passes_of(WAITING)
    above, below = rank + 1, num_ranks - 1 - rank  # ranks up to this one; ranks nearer to the turn
    # at the turn, the first pair waits for its own forward: without overlap the bubble is smaller
    first = f_down.overlapped() if below else f_down
    phases = (
        ((f_down,), 2 * below),
        ((f_down, f_up), above),
        ((i_up, w, f_up), below),
        ((first, b_up, f_up.overlapped(), b_down), 1),
        ((f_down.overlapped(), b_up, f_up.overlapped(), b_down), num_microbatches - 2 * num_ranks + above - 1),
        ((b_up, f_up.overlapped(), b_down), below),
        ((b_up, b_down), above // 2),
        ((b_up, i_down), above % 2),
        ((i_up, i_down), above // 2),  # the second half leaves its weight gradients for the bubbles at the end
        ((w, i_down), below),
        ((w,), above),
    )
    return scripted(phases, num_microbatches)

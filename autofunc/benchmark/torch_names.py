"""Torch's counterparts of our schedules, and what each of them takes. Imports no torch.

From `torch/distributed/pipelining/schedules.py`, torch 2.13.0.
"""

from __future__ import annotations

from typing import NamedTuple


class TorchSchedule(NamedTuple):
    """Requirements of one of torch's schedules."""

    per_rank: int  # stages; 0: one or more
    in_v: bool  # rank r has stages r and 2p - 1 - r, instead of r, r + p, ...
    splits_backward: bool  # into I and W, which torch refuses for compiled modules


TORCH_SCHEDULES = {
    "GPipe": TorchSchedule(1, False, False),
    "1F1B": TorchSchedule(1, False, False),
    "LoopedBFS": TorchSchedule(0, False, False),
    "Interleaved1F1B": TorchSchedule(0, False, False),
    "InterleavedZeroBubble": TorchSchedule(0, False, True),
    "ZBVZeroBubble": TorchSchedule(2, True, True),
    "DualPipeV": TorchSchedule(2, True, True),
}

COUNTERPARTS = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "looped_bfs": "LoopedBFS",
    "interleaved_1f1b": "Interleaved1F1B",
    "interleaved_zb": "InterleavedZeroBubble",
    "zbv": "ZBVZeroBubble",
    "dualpipe_v": "DualPipeV",
}
"""Torch's counterpart of each of our schedules."""

ON_ONE_RANK = {"GPipe": "LoopedBFS", "1F1B": "Interleaved1F1B"}
"""Schedules that take several stages in one process, in the same order as these, which take one stage per rank."""


def stages_of_rank(rank: int, ranks: int, stages: int, in_v: bool) -> list[int]:
    """Return the stages of a rank.

    >>> stages_of_rank(1, 2, 4, in_v=False), stages_of_rank(1, 2, 4, in_v=True)
    ([1, 3], [1, 2])
    """
    return [rank, 2 * ranks - 1 - rank] if in_v else list(range(rank, stages, ranks))

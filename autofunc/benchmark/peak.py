"""How much memory a step takes at its peak beside what was there before it, by what allocators say."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_MEMORY = "[memory]"
"""What the profiler calls an allocation, or, with bytes below zero, its end."""

_ERRORS = "6"


def peak_bytes(step: Callable[[], object], device: torch.device, before: int) -> int:
    """The most bytes that are allocated while a step runs, temporaries of operators included.

    On a CPU those that the step allocates. On a GPU all above `before`, and what pools of recorded graphs reserve.

    Args:
        step: warm, and nothing that it made before is alive.
        device: that it runs on.
        before: see `allocated_bytes`; of a GPU, from before the contender was made.
    """
    if device.type == "cpu":
        return _of_cpu(step)
    gc.collect()
    torch.accelerator.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.accelerator.synchronize(device)
    return torch.cuda.max_memory_allocated(device) + _free_in_pools() - before


def allocated_bytes(device: torch.device) -> int:
    """What is allocated on a GPU, and reserved for graphs; of a CPU 0, where steps alone are counted."""
    if device.type == "cpu":
        return 0
    gc.collect()
    torch.accelerator.synchronize(device)
    return torch.cuda.memory_allocated(device) + _free_in_pools()


def _free_in_pools() -> int:
    """What the pools of graphs reserve beside what is allocated in them: graphs write there."""
    snapshot: Any = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    segments = [each for each in snapshot if tuple(each["segment_pool_id"]) != (0, 0)]
    return sum(each["total_size"] - each["allocated_size"] for each in segments)


def _of_cpu(step: Callable[[], object]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", _ERRORS)  # read when the profiler starts, which else says so each time
    collects = gc.isenabled()
    gc.disable()  # what was made before is not to go in between
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as watched:
        step()
    if collects:
        gc.enable()
    profiler: Any = watched.profiler
    changes = [each for each in profiler.kineto_results.events() if each.name() == _MEMORY]
    alive = most = 0
    for each in sorted(changes, key=lambda each: each.start_ns()):
        alive += each.nbytes()
        most = max(most, alive)
    return int(most)

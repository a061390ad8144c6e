"""Peak memory of a step beyond what was allocated before, as reported by the allocators."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_MEMORY = "[memory]"
"""The profiler's name of an allocation; of its end, if the number of bytes is negative."""

_ERRORS = "6"


def peak_bytes(step: Callable[[], object], device: torch.device, before: int) -> int:
    """Return the most bytes allocated during a step, including temporaries of operators.

    On a CPU this counts the step's own allocations; on a GPU everything above `before`, and the pools of recorded graphs.

    Args:
        step: must be warm, with no results of earlier steps alive.
        device: the device it runs on.
        before: from `allocated_bytes`; on a GPU, taken before the contender was built.
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
    """Return the bytes allocated on a GPU, or reserved for graphs; 0 on a CPU, where only the step itself counts."""
    if device.type == "cpu":
        return 0
    gc.collect()
    torch.accelerator.synchronize(device)
    return torch.cuda.memory_allocated(device) + _free_in_pools()


def _free_in_pools() -> int:
    """Return the bytes that pools of graphs reserve beyond their allocations: graphs write there."""
    snapshot: Any = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    segments = [each for each in snapshot if tuple(each["segment_pool_id"]) != (0, 0)]
    return sum(each["total_size"] - each["allocated_size"] for each in segments)


def _of_cpu(step: Callable[[], object]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", _ERRORS)  # read when the profiler starts, which otherwise logs each time
    collects = gc.isenabled()
    gc.disable()  # keeps older objects from being freed during the step
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

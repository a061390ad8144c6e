"""Speed and memory of a step; everything known in advance is computed before the run."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from autofunc.engine.device_speed import peak_tflops
from autofunc.errors import ModelError
from autofunc.shown import size_in_words
from autofunc.splitting.cost import count_operations
from autofunc.train.recipe import Recipe

MEASURED = ("step_time_ms", "tokens_per_second", "rows_per_second", "mfu", "peak_memory_bytes", "bubble_fraction")
"""Step values that depend on the machine and differ between runs."""

_OF_A_STEP = 3
"""Operations of a step over those of its forward: for each product of the forward, the backward has two."""


@dataclass(frozen=True)
class Speed:
    """Speed of one step."""

    units: int  # tokens, or rows if rows hold no tokens, over all ranks
    unit: str  # "tokens" or "rows"
    seconds: float
    mfu: float | None  # model FLOPs utilization; None if the device's peak is unknown
    peak_memory_bytes: int  # of this process so far

    def named(self) -> dict[str, Any]:
        """Return all values by name."""
        found = {
            "num_tokens": self.units, "step_time_ms": self.seconds * 1e3,
            f"{self.unit}_per_second": self.units / self.seconds, "peak_memory_bytes": self.peak_memory_bytes,
        }  # fmt: skip
        return found if self.mfu is None else {**found, "mfu": self.mfu}

    def text(self) -> str:
        """Return the text for a line of progress."""
        used = "" if self.mfu is None else f"  MFU {self.mfu:.1%}"
        return f"{self.units / self.seconds:,.0f} {self.unit}/s{used}  {size_in_words(self.peak_memory_bytes)}"


class Speedometer:
    """Computes the speed of steps.

    Args:
        recipe: of the run.
        device: of this process; all processes use the same kind.
        tell: called if operations cannot be counted; the run continues.
    """

    def __init__(self, recipe: Recipe, device: torch.device, tell: Callable[[str], None]) -> None:
        self._device = device
        self._operations_per_unit = 0.0
        peak = peak_flops(device, recipe.peak_tflops)
        self._peak = None if peak is None else peak * recipe.axes.num_processes
        if self._peak is None:
            return
        microbatch = recipe.microbatch((recipe.seed, 1))
        units, _ = units_of(microbatch, recipe.microbatch_rows)
        try:
            costs = count_operations(recipe.model, microbatch, recipe.loss)
            self._operations_per_unit = _OF_A_STEP * sum(each.flops for each in costs.values()) / units
        except ModelError as error:
            self._peak = None
            tell(f"no mfu, because the operations of a step cannot be counted: {error}")

    def of(self, units: int, unit: str, seconds: float) -> Speed:
        """Return the speed of a step.

        Args:
            units: tokens or rows in the step.
            unit: "tokens" or "rows".
            seconds: duration of the step, including the wait for data.
        """
        used = None if self._peak is None else self._operations_per_unit * units / (seconds * self._peak)
        return Speed(units, unit, seconds, used, peak_memory_bytes(self._device))


def units_of(batch: Any, num_rows: int) -> tuple[int, str]:
    """Return the size of rows and its unit: tokens, or rows if they hold none."""
    ids = batch.get("input_ids")
    return (num_rows, "rows") if ids is None else (num_rows * ids[0].numel(), "tokens")


def peak_flops(device: torch.device, given_tflops: float | None) -> float | None:
    """Return a device's peak floating-point operations per second; None if unknown.

    Args:
        device: to look up.
        given_tflops: the configured peak, in 1e12 operations per second.
    """
    tflops = peak_tflops(device) if given_tflops is None else given_tflops
    return None if tflops is None else tflops * 1e12


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak bytes of tensors on a GPU since the process began; on a CPU the peak of the whole process."""
    if device.type != "cpu":
        return int(torch.accelerator.max_memory_allocated(device))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def peaks_of_all(device: torch.device) -> tuple[int, ...]:
    """Return `peak_memory_bytes` of every process of the run, by rank. All processes call it."""
    mine = peak_memory_bytes(device)
    if not dist.is_initialized():
        return (mine,)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return tuple(found)

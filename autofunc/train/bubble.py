"""The bubble of a run, measured in a few of its steps; other steps pay nothing for it."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch.distributed.device_mesh import DeviceMesh

from autofunc.mesh import axis_group
from autofunc.runtime.debug import observe_as
from autofunc.runtime.measure import observed_step
from autofunc.runtime.step import Observe, StepResult
from autofunc.schedule import Timeline

STEPS_BETWEEN = 50


class BubbleMeter:
    """Runs steps, and measures every fiftieth one and the last.

    Ranks that share a process take turns and have no bubble, so only runs of several processes are measured. Nothing is
    measured under debug settings that observe each step, because they would distort the times.

    Args:
        mesh: of the run.
        device: of this process.
        num_steps: of the run.
    """

    def __init__(self, mesh: DeviceMesh | None, device: torch.device, num_steps: int) -> None:
        self._group, self._device, self._num_steps = axis_group(mesh, "pp"), device, num_steps
        self.timeline: Timeline | None = None
        """The last measured step."""
        self._measures = self._group is not None and observe_as(os.environ) is None

    def run(self, step: int, run: Callable[[Observe | None], StepResult]) -> tuple[StepResult, float | None]:
        """Run a step; return its result and its bubble, or None if it was not measured. All pp ranks call it alike.

        Args:
            step: its number, from 1. The first step is never measured, because it includes one-time work.
            run: runs it under an observer.
        """
        if not self._measures or step == 1 or (step % STEPS_BETWEEN and step != self._num_steps):
            return run(None), None
        result, self.timeline = observed_step(run, self._group, self._device)
        return result, self.timeline.bubble_fraction

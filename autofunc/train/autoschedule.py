"""`schedule: auto`: measure costs when a run starts, then search for a schedule that fits them.

Costs belong to stages, and all ranks are assumed alike. The search may therefore place stages differently from the measured
schedule (in a V, if a rank holds several). Training results do not depend on the choice: searched schedules keep the order
of gradient sums, as the named ones do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.device_mesh import DeviceMesh

from autofunc.errors import ConfigError, ScheduleError
from autofunc.schedule import (
    Costs,
    Memory,
    Schedule,
    StageBytes,
    Timeline,
    from_text,
    lower_bound,
    peak_bytes,
    search,
    simulate,
    to_text,
)
from autofunc.schedule.footprint.live import peak_held
from autofunc.train.batches import to_device
from autofunc.train.loop import build_pipe
from autofunc.train.progress import search_bar
from autofunc.train.recipe import Recipe
from autofunc.train.weighing import counting_all

SECONDS = 3.0
"""Length of a search, unless it proves earlier that no schedule is better."""


@dataclass(frozen=True)
class Found:
    """The result of a search."""

    timeline: Timeline  # of the best schedule, predicted, in ms
    measured: Timeline  # of the schedule the costs were measured with, predicted from them, in ms
    costs: Costs  # in ms
    memory: tuple[StageBytes, ...] | None  # set if bytes limited the search

    @property
    def schedule(self) -> Schedule:
        """The schedule to train with."""
        return self.timeline.schedule

    def report(self) -> list[str]:
        """Lines for people: measured costs, the chosen schedule and its predicted step time."""
        f, i, w = (_milliseconds(cost) for cost in (self.costs.F, self.costs.I, self.costs.W))
        lines = [
            f"ms of a microbatch by stage: F {f}, I {i}, W {w}, transfer {self.costs.comm:.3g}",
            f"schedule auto: {self._promise(self.timeline)}",
        ]
        if self.schedule != self.measured.schedule:
            lines.append(f"instead of: {self._promise(self.measured)}")
        return lines

    def _promise(self, timeline: Timeline) -> str:
        s, held = timeline.schedule, f"{max(timeline.peak_activations)} activations"
        if self.memory is not None:
            held = f"{max(peak_bytes(s, self.memory)):,.0f} bytes"
        return f"{s.name}, {timeline.makespan:.3g} ms a step predicted, {held} at most"


def find_schedule(recipe: Recipe, mesh: DeviceMesh, device: torch.device, console: Console | None) -> Found:
    """Measure costs and search. All ranks call it and get the same result; the first one searches.

    Args:
        recipe: one whose `searches` is true.
        mesh: of all ranks.
        device: of this rank.
        console: where the first rank shows progress.

    Raises:
        ConfigError: if the memory budget is too small.
    """
    by_bytes = recipe.search_budget is not None or recipe.options.remat == "auto"
    shown = console or Console(quiet=True)
    pipe = build_pipe(recipe, mesh)
    params = pipe.init(recipe.init_seed, device)
    batch = to_device(counting_all(recipe.example()), device)
    key = (recipe.seed, 1)  # of the first step, so that the measured work includes dropout as trained
    with shown.status("measuring what the stages cost"):
        costs = pipe.costs(params, batch, key)
        memory = pipe.memory(params, batch, key) if by_bytes else None
    limits = search_limits(recipe, memory)
    answer: list[tuple[str, str] | None] = [None]
    if dist.get_rank() == 0:
        with search_bar(shown, SECONDS) as on_progress:
            best = search(costs, **limits, time_limit_s=SECONDS, seed=recipe.seed, on_progress=on_progress)
        answer = [(best.name, to_text(best))]
    dist.broadcast_object_list(answer, src=0)  # each dp and tp coordinate measured separately: all use the first rank's
    assert answer[0] is not None
    name, text = answer[0]
    return Found(simulate(from_text(text, name), costs), simulate(recipe.schedule, costs), costs, memory)


def search_limits(recipe: Recipe, memory: Sequence[StageBytes] | None) -> dict[str, Any]:
    """Return sizes and limits of a search, as `schedule.search` takes them.

    Args:
        recipe: one whose `searches` is true.
        memory: bytes that stages keep; None limits activations instead.

    Raises:
        ConfigError: if `recipe.search_budget` does not fit a single microbatch.
    """
    num_ranks, num_stages = recipe.schedule.num_ranks, recipe.schedule.num_stages
    limits: dict[str, Any] = {
        "num_ranks": num_ranks,
        "num_microbatches": recipe.schedule.num_microbatches,
        "stages_per_rank": num_stages // num_ranks,
        "memory_limit": num_stages,  # activations of 1F1B's busiest rank: one microbatch per rank
    }
    if memory is not None:
        rough = Memory.of_stages(memory)
        budget: float | None = recipe.search_budget
        if budget is None:  # remat auto: the engine found a way to fit what the measured schedule holds
            kept, weight = (rough.per_stage(name, num_stages).tolist() for name in ("residuals", "weight_residuals"))
            budget = max(peak_held(recipe.schedule, kept, weight))
        limits |= {"memory_limit": budget, "memory": rough}
    try:
        lower_bound(Costs(), **limits)
    except ScheduleError as error:
        raise ConfigError(
            f"distributed.memory_budget={recipe.search_budget} is too small for schedule auto: {error}; allow more, or use "
            "more stages, smaller microbatches (step_scheduler.local_batch_size) or remat: layer"
        ) from error
    return limits


def _milliseconds(cost: float | Sequence[float]) -> str:
    return " ".join(f"{each:.3g}" for each in ([cost] if isinstance(cost, float | int) else cost))

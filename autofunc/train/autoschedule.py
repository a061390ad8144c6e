"""`schedule: auto`: costs are measured when a run starts, and a schedule is searched for them.

Costs belong to stages and ranks are taken to be alike, so what is found may place the stages otherwise (in a V, where a
rank has several) than the schedule that was measured with. The numbers of training do not depend on it: every schedule that
a search gives is in order, as the named ones are.
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
"""How long a search lasts, unless it finds earlier that nothing can be better."""


@dataclass(frozen=True)
class Found:
    """What a search ended with."""

    timeline: Timeline  # of the schedule that was found, as predicted, in ms
    measured: Timeline  # of the one that costs were measured with, as predicted from them
    costs: Costs  # in ms
    memory: tuple[StageBytes, ...] | None  # known where bytes limited the search

    @property
    def schedule(self) -> Schedule:
        """What to train with."""
        return self.timeline.schedule

    def report(self) -> list[str]:
        """Lines for people: what was measured, what was chosen and what that promises."""
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
    """Measure and search. Every rank calls it, and all get the same; the first one searches.

    Args:
        recipe: one that `searches`.
        mesh: of all ranks.
        device: of this rank.
        console: where the first rank shows that it goes on.

    Raises:
        ConfigError: when the memory budget is too small.
    """
    by_bytes = recipe.search_budget is not None or recipe.options.remat == "auto"
    shown = console or Console(quiet=True)
    pipe = build_pipe(recipe, mesh)
    params = pipe.init(recipe.init_seed, device)
    batch = to_device(counting_all(recipe.example()), device)
    key = (recipe.seed, 1)  # of the first step: what is measured is what is trained, dropout included
    with shown.status("measuring what the stages cost"):
        costs = pipe.costs(params, batch, key)
        memory = pipe.memory(params, batch, key) if by_bytes else None
    limits = search_limits(recipe, memory)
    answer: list[tuple[str, str] | None] = [None]
    if dist.get_rank() == 0:
        with search_bar(shown, SECONDS) as on_progress:
            best = search(costs, **limits, time_limit_s=SECONDS, seed=recipe.seed, on_progress=on_progress)
        answer = [(best.name, to_text(best))]
    dist.broadcast_object_list(answer, src=0)  # to all, for each dp and tp coordinate has measured by itself
    assert answer[0] is not None
    name, text = answer[0]
    return Found(simulate(from_text(text, name), costs), simulate(recipe.schedule, costs), costs, memory)


def search_limits(recipe: Recipe, memory: Sequence[StageBytes] | None) -> dict[str, Any]:
    """The sizes and limits of a search, as `schedule.search` takes them.

    Args:
        recipe: one that `searches`.
        memory: what the stages keep; None limits activations instead.

    Raises:
        ConfigError: when not even one microbatch fits into `recipe.search_budget`.
    """
    num_ranks, num_stages = recipe.schedule.num_ranks, recipe.schedule.num_stages
    limits: dict[str, Any] = {
        "num_ranks": num_ranks,
        "num_microbatches": recipe.schedule.num_microbatches,
        "stages_per_rank": num_stages // num_ranks,
        "memory_limit": num_stages,  # the activations of 1F1B's busiest rank: a microbatch for each rank
    }
    if memory is not None:
        rough = Memory.of_stages(memory)
        budget: float | None = recipe.search_budget
        if budget is None:  # of remat auto: for what the measured schedule holds, the engine found a way to fit
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

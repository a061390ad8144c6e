"""A torch pipeline as a contender: built from our stages, sharing the memory of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor, nn

from autofunc.benchmark.contender import Contender
from autofunc.benchmark.runner import Alive, Bystander, Runner
from autofunc.benchmark.subject import Subject
from autofunc.benchmark.teams import Team, World
from autofunc.benchmark.torch_names import TORCH_SCHEDULES, stages_of_rank
from autofunc.benchmark.torch_pipeline import Recorded, TorchPipeline
from autofunc.benchmark.torch_stage import MakeModule, StageModule, ends_of, graph_of, stacked
from autofunc.errors import ModelError
from autofunc.schedule import Timeline, from_actions
from autofunc.splitting import Stage
from autofunc.splitting.infer import follow


class TorchRunner:
    """A torch pipeline that implements `Runner`.

    Args:
        pipe: this process's part of the pipeline.
        contender: the schedule and the choices.
        team: the pipeline's processes.
        paths: canonical paths of the parameters that this process trains.
    """

    def __init__(self, pipe: TorchPipeline, contender: Contender, team: Team, paths: set[str]) -> None:
        self._pipe, self._contender, self._team, self._paths = pipe, contender, team, paths

    def step(self) -> None:
        """See `Runner`."""
        self._pipe.step()

    def drop(self) -> None:
        """See `Runner`."""
        self._pipe.drop()

    def grads(self) -> dict[str, Tensor]:
        """See `Runner`."""
        return self._pipe.grads()

    def paths(self) -> set[str]:
        """See `Runner`."""
        return self._paths

    def buffer_bytes(self) -> int:
        """See `Runner`."""
        return self._pipe.buffer_bytes()

    def timeline(self) -> Timeline | None:
        """See `Runner`. In one process torch has one rank."""
        rows = self._of_team(self._pipe.recorded_step())
        return timeline_of(rows, self._contender.schedule, f"torch {self._contender.how}, measured")

    def _of_team(self, own: Recorded) -> list[Recorded]:
        found: list[Any] = [own]
        if self._team.size > 1:
            found = [None] * self._team.size
            dist.all_gather_object(found, own, group=self._team.group)
        return found

    def alive(self) -> Alive | None:
        """See `Runner`."""
        return None

    def close(self) -> None:
        """See `Runner`. Torch's pipeline holds nothing but memory."""


def make_torch_runner(
    subject: Subject, contender: Contender, team: Team, world: World, make_module: MakeModule | None = None
) -> Runner:
    """Build a contender; every process of the benchmark calls this, including those outside its team.

    Args:
        subject: the benchmark's model, batch and loss.
        contender: the schedule and the choices.
        team: the pipeline's processes.
        world: all processes.
        make_module: builds modules instead of tracing them.

    Raises:
        ModelError: for what torch's pipeline does not take.
        Exception: whatever torch raises.
    """
    if subject.sharding.mp_policy.param_dtype is not None:
        raise ModelError("torch's pipeline has no mixed precision; compare without mp_policy.param_dtype")
    stages, microbatches = subject.stages(contender.stages), subject.microbatches(contender.microbatches)
    in_v = TORCH_SCHEDULES[contender.schedule].in_v
    of_rank = [stages_of_rank(rank, team.size, len(stages), in_v) for rank in range(team.size)]
    holders = _holders(stages, of_rank)
    shared = {path: world.group(sorted(set(ranks))) for path, ranks in holders.items() if len(set(ranks)) > 1}
    if not team.plays:
        return Bystander()
    if world.size == 1:
        _alone()
    contexts, boundaries = follow(stages, subject.params, microbatches[0], subject.loss, device=subject.device)
    modules: dict[int, nn.Module] = {}
    ends = {}
    for number in of_rank[team.rank]:
        stage, context = stages[number], contexts[number]
        if make_module is None:
            modules[number] = StageModule(stage, subject.params, graph_of(context))
        else:
            modules[number] = make_module(stage, subject.params)
        ends[number] = ends_of(context, boundaries.stages[number])
    own = {path for path, ranks in holders.items() if team.rank in ranks}
    model = stages[0].model
    pipe = TorchPipeline(
        contender.schedule, modules, ends, len(stages), contender.microbatches, stacked(microbatches), subject.device,
        team.group, bool(contender.compile), {path: model.canonical(path) for path in model.spec},
        {path: shared.get(path) for path in sorted(own) if len(holders[path]) > 1},
    )  # fmt: skip
    return TorchRunner(pipe, contender, team, own)


def _holders(stages: Sequence[Stage], of_rank: Sequence[Sequence[int]]) -> dict[str, list[int]]:
    """Map each trained parameter's canonical path to the ranks of the layers that use it."""
    found: dict[str, list[int]] = {}
    for rank, numbers in enumerate(of_rank):
        for stage in (stages[number] for number in numbers):
            for path in stage.trainable_holders:
                found.setdefault(stage.model.canonical(path), []).append(rank)
    return dict(sorted(found.items()))


def timeline_of(rows: Sequence[Recorded], name: str, label: str) -> Timeline:
    """Return a timeline in milliseconds of actions as they ran, on ranks that share one machine's clock.

    Args:
        rows: recorded actions by rank.
        name: the schedule's name.
        label: the timeline's label.
    """
    ordered = [sorted(row, key=lambda each: each[1]) for row in rows]
    schedule = from_actions([[action for action, _, _ in row] for row in ordered], name)
    origin = min(row[0][1] for row in ordered)

    def times(place: Callable[[Any], float]) -> tuple[Any, ...]:
        return tuple(np.array([(place(each) - origin) * 1e3 for each in row]) for row in ordered)

    return Timeline(schedule, times(lambda each: each[1]), times(lambda each: each[2]), label=label)


def _alone() -> None:
    """Start the process group that torch's pipeline requires, with this process alone: it sends nothing."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

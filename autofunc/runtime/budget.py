"""What stages keep under a memory budget: the choice with the shortest step among those that fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from autofunc.engine import GraphStage, Keep
from autofunc.engine.capture import Joint
from autofunc.errors import AutofuncError
from autofunc.schedule import Costs, Kind, Schedule, StageBytes, live_bytes, simulate
from autofunc.splitting import Boundaries, StageContext


def _choices(splits: bool) -> Iterator[Keep]:
    """Yield the possible choices, from keeping everything to keeping the least."""
    early = (0.0, 0.25, 0.5, 0.75, 1.0) if splits else (0.0,)
    for recompute in (None, "cheap", "layer", "stage"):
        for part in early:
            yield Keep(recompute, part)


def fitting_keeps(
    joints: Mapping[int, Joint],
    contexts: Mapping[int, StageContext],
    budget: int,
    schedule: Schedule,
    boundaries: Boundaries,
) -> dict[int, Keep]:
    """Return, by stage, the choice with the shortest simulated step among those that fit; one choice per rank.

    Args:
        joints: captured stages of this process.
        contexts: the same stages.
        budget: bytes that may be alive on a rank.
        schedule: lowered.
        boundaries: of all stages.

    Raises:
        AutofuncError: if no choice fits.
    """
    found: dict[int, Keep] = {}
    edges = boundaries.edges()
    for rank in range(schedule.num_ranks):
        mine = [index for index in schedule.stages_of(rank) if index in joints]
        if not mine:
            continue
        splits = any(action.kind is Kind.I for action in schedule[rank])
        fitting: list[tuple[float, int, Keep]] = []
        least = 0.0
        for number, keep in enumerate(_choices(splits)):
            trial = {index: GraphStage(joints[index], contexts[index], keep) for index in mine}
            memory = _with_others(boundaries, {index: stage.bytes for index, stage in trial.items()})
            peak = float(live_bytes(schedule, memory, edges, ranks=[rank])[0].max(initial=0.0))
            least = min(least, peak) if number else peak
            if peak <= budget:
                f, i, w = (sum(column) / len(mine) for column in zip(*(s.work for s in trial.values()), strict=True))
                fitting.append((simulate(schedule, Costs(f, i, w), edges).makespan, number, keep))
        if not fitting:
            raise AutofuncError(
                f"memory_budget={budget:,} bytes: rank {rank} with schedule {schedule.name} keeps at least {least:,.0f} "
                "bytes alive, whatever it recomputes; allow that, or use more stages, smaller microbatches or a "
                "schedule with fewer activations"
            )
        found.update(dict.fromkeys(mine, min(fitting)[2]))
    return found


def _with_others(boundaries: Boundaries, known: Mapping[int, StageBytes]) -> Sequence[StageBytes]:
    """Return the bytes of all stages; those of other ranks matter only for the values they send."""
    memory = []
    for index, boundary in enumerate(boundaries.stages):
        sizes = tuple(value.num_bytes for value in boundary.values)
        cotangents = tuple(value.num_bytes for value in boundary.values if value.needs_grad)
        memory.append(known.get(index, StageBytes(sizes, cotangents, 0, 0, 0)))
    return memory

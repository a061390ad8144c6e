"""Where a step is, for errors: rank, step, action, and the grid with the action marked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from autofunc.errors import AutofuncError, PipelineRunError
from autofunc.runtime.ops import Op
from autofunc.schedule import grid

if TYPE_CHECKING:
    from autofunc.runtime.executor import RankStep


def place_of(step: RankStep, op: Op | None) -> dict[str, Any]:
    """Return where a step is, as keyword arguments of `PipelineRunError`."""
    rank = step.program.rank
    if op is None:
        return {"rank": rank, "step": step.number}
    action = step.program.schedule[rank][op.position]
    microbatch = None if action.kind.is_sharding else action.microbatch
    return {
        "rank": rank, "step": step.number, "action": str(action), "stage": action.stage, "microbatch": microbatch,
    }  # fmt: skip


def named(place: Mapping[str, Any]) -> str:
    """Return the same in words."""
    text = f"rank {place['rank']}, step {place['step']}"
    if "action" not in place:
        return text
    of = (
        f"stage {place['stage']}"
        if place["microbatch"] is None
        else f"stage {place['stage']}, microbatch {place['microbatch']}"
    )
    return f"{text}, action {place['action']} ({of})"


def marked(step: RankStep, op: Op | None) -> str:
    """Return the grid with the op's action marked, on separate lines."""
    return "" if op is None else "\n" + grid(step.program.schedule, (step.program.rank, op.position))


def add_place(error: AutofuncError, step: RankStep, op: Op | None) -> None:
    """Add to an error where it was raised; its type and message stay."""
    place = place_of(step, op)
    if isinstance(error, PipelineRunError):
        for name, value in place.items():
            if getattr(error, name) is None:
                setattr(error, name, value)
    error.add_note(f"at {named(place)}{marked(step, op)}")

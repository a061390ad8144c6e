"""Options that several commands share, said once.

Typer reads a command's options from its signature. A command here takes groups of options as dataclasses; `takes_groups`
gives it the signature that typer needs, with the fields of all groups.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from autofunc import schedule
from autofunc.errors import ScheduleError


@dataclass(frozen=True)
class Sizes:
    """How large a schedule is."""

    ranks: Annotated[int, typer.Option("--ranks", "-p", help="Pipeline ranks.")] = 4
    microbatches: Annotated[int, typer.Option("--microbatches", "-m", help="Microbatches of a step.")] = 8
    stages_per_rank: Annotated[
        int | None, typer.Option("--stages-per-rank", "-v", help="Stages on each rank.", show_default="the schedule's")
    ] = None


@dataclass(frozen=True)
class CostOptions:
    """What actions cost."""

    forward: Annotated[str, typer.Option("-F", help="Time of a rank's forward of a microbatch; or by stage: 1,2,1.5")] = "1"
    input: Annotated[str, typer.Option("-I", help="Time of its backward of the input.")] = "1"
    weight: Annotated[str, typer.Option("-W", help="Time of its backward of the weights.")] = "1"
    comm: Annotated[float, typer.Option("--comm", help="Time of one transfer between ranks.")] = 0.0
    costs: Annotated[
        str | None, typer.Option("--costs", metavar="FILE", help="Costs by stage from a JSON file, instead.")
    ] = None

    def by_stage(self, stages_per_rank: float) -> tuple[schedule.Costs, schedule.Memory | None]:
        """Costs of a stage, and bytes if the file has them. Stages of a rank share its time evenly."""
        if self.costs is not None:
            return schedule.read_costs(self.costs)
        f, i, w = (_times(name, text, stages_per_rank) for name, text in zip("FIW", self._texts, strict=True))
        return schedule.Costs(f, i, w, self.comm), None

    @property
    def _texts(self) -> tuple[str, str, str]:
        return self.forward, self.input, self.weight


def _times(name: str, text: str, stages_per_rank: float) -> float | list[float]:
    try:
        times = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ScheduleError(f"-{name} {text!r}: expected a number, or one for each stage with commas between") from error
    return times[0] / stages_per_rank if len(times) == 1 else times


def takes_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes dataclasses of options a signature with their fields."""
    hints = get_type_hints(command, include_extras=True)
    own = inspect.signature(command).parameters
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if name in own and is_dataclass(hint)}
    parameters = []
    for name, parameter in own.items():
        if name not in groups:
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        kinds = get_type_hints(groups[name], include_extras=True)
        for field in fields(groups[name]):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            parameters.append(
                inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kinds[field.name])
            )

    @wraps(command)
    def with_groups(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    with_groups.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_groups.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_groups

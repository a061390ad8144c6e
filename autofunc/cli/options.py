"""Options that several commands share, each declared once.

Typer reads a command's options from its signature. A command here takes groups of options as dataclasses; `takes_groups`
gives it the signature that typer needs, with the fields of all groups.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import wraps
from itertools import pairwise
from typing import Annotated, Any, get_type_hints

import typer

import autofunc as af
from autofunc.errors import ScheduleError

TAKES_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Settings of a command whose remaining arguments set keys of the configuration."""

ConfigFile = Annotated[str, typer.Option("--config", "-c", help="YAML file of a run.")]


@dataclass(frozen=True)
class StartOptions:
    """The configuration, and in how many processes to start it."""

    config: ConfigFile
    nproc_per_node: Annotated[
        int | None,
        typer.Option("--nproc-per-node", "--nproc_per_node", min=1, help="Processes to start; pp_size by default."),
    ] = None


@dataclass(frozen=True)
class RunOptions(StartOptions):
    """Options for starting a run."""

    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in output_dir.")] = False
    max_restarts: Annotated[
        int,
        typer.Option("--max-restarts", min=0, help="Most times to resume from the latest checkpoint after a failure."),
    ] = 0
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Show only errors and the last line; files are written as usual.")
    ] = False


@dataclass(frozen=True)
class EvaluateOptions(StartOptions):
    """Options for starting an evaluation."""

    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of text.")] = False


@dataclass(frozen=True)
class GenerateOptions:
    """What to generate, with which model."""

    config: Annotated[str | None, typer.Option("--config", "-c", help="YAML file of a run.")] = None
    model: Annotated[
        str | None, typer.Option("--model", metavar="FOLDER", help="Instead of -c: config.json, weights and tokenizer.")
    ] = None
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="Beginning of the text; can be repeated.")] = None
    prompt_file: Annotated[str | None, typer.Option("--prompt-file", metavar="FILE", help="Prompts, one per line.")] = None
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens to add to a prompt.")] = 64
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0, help="Sample tokens; by default take the likeliest.")
    ] = None
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Sample from the likeliest tokens that sum to this probability.")
    ] = None
    top_k: Annotated[int | None, typer.Option("--top-k", min=1, help="Sample from this many of the likeliest tokens.")] = (
        None
    )
    seed: Annotated[int, typer.Option("--seed", help="Seed of sampling.")] = 0
    pp: Annotated[
        int | None, typer.Option("--pp", min=1, help="Pipeline ranks; by default the file's, or 1 with --model.")
    ] = None
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", metavar="NAME", help="A folder, a name on the hub, or bytes.")
    ] = None
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of text.")] = False


@dataclass(frozen=True)
class Sizes:
    """The size of a schedule."""

    ranks: Annotated[int, typer.Option("--ranks", "-p", min=1, help="Pipeline ranks.")] = 4
    microbatches: Annotated[int, typer.Option("--microbatches", "-m", min=1, help="Microbatches per step.")] = 8
    stages_per_rank: Annotated[
        int | None,
        typer.Option("--stages-per-rank", "-v", min=1, help="Stages on each rank.", show_default="the schedule's"),
    ] = None


@dataclass(frozen=True)
class CostOptions:
    """The costs of actions."""

    forward: Annotated[
        str, typer.Option("-F", help="Time of a rank's forward per microbatch; or a list by stage: 1,2,1.5")
    ] = "1"
    input: Annotated[str, typer.Option("-I", help="Time of its input backward, in the same form.")] = "1"
    weight: Annotated[str, typer.Option("-W", help="Time of its weight backward, in the same form.")] = "1"
    comm: Annotated[float, typer.Option("--comm", help="Time of one transfer between ranks.")] = 0.0
    costs: Annotated[
        str | None, typer.Option("--costs", metavar="FILE", help="Read costs, and bytes, from a JSON file instead.")
    ] = None

    def read(self) -> tuple[af.schedule.Costs, af.schedule.Memory | None]:
        """Return the costs, and bytes if the file has them. Single numbers are times per rank, lists are per stage."""
        given = {f"-{name}": text for name, text in zip("FIW", (self.forward, self.input, self.weight), strict=True)}
        if self.costs is None:
            f, i, w = (_times(option, text) for option, text in given.items())
            return af.schedule.Costs(f, i, w, self.comm), None
        for option, text in (given | {"--comm": str(self.comm)}).items():
            if text != ("0.0" if option == "--comm" else "1"):
                raise ScheduleError(f"{option} {text} and --costs {self.costs} were both given; expected one of them")
        return af.schedule.read_costs(self.costs)


def _times(option: str, text: str) -> float | list[float]:
    try:
        times = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ScheduleError(f"{option} {text!r}: expected a number, or one per stage separated by commas") from error
    return times[0] if len(times) == 1 else times


def by_stage(costs: af.schedule.Costs, num_ranks: int, num_stages: int) -> af.schedule.Costs:
    """Return costs per stage: the stages of a rank share a rank's time evenly.

    Lists of times belong to even parts of the model. If a schedule has more or fewer stages, each takes its share of those
    parts. A number of times that fits no schedule on these ranks is left as it is, and refused later.
    """
    if isinstance(costs.comm, dict) and any(
        not isinstance(cost, (int, float)) and len(cost) != num_stages for cost in (costs.F, costs.I, costs.W)
    ):
        raise ScheduleError(f"the costs of transfers are per stage, so they do not fit a schedule with {num_stages} stages")
    f, i, w = (
        cost * num_ranks / num_stages if isinstance(cost, (int, float)) else _cut_elsewhere(cost, num_ranks, num_stages)
        for cost in (costs.F, costs.I, costs.W)
    )
    return replace(costs, F=f, I=i, W=w)


def _cut_elsewhere(times: Sequence[float], num_ranks: int, num_stages: int) -> Sequence[float]:
    """Redistribute times of even parts of a model over another number of even parts."""
    if len(times) == num_stages or len(times) % num_ranks:
        return times
    ends = [index / len(times) for index in range(len(times) + 1)]
    made = []
    for stage in range(num_stages):
        begin, end = stage / num_stages, (stage + 1) / num_stages
        shares = (max(0.0, min(end, right) - max(begin, left)) for left, right in pairwise(ends))
        made.append(sum(share * len(times) * time for share, time in zip(shares, times, strict=True)))
    return made


def takes_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Flatten dataclass arguments of a command into its signature, for typer."""
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

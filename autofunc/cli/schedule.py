"""`autofunc schedule`: look at schedules without torch, processes or a model."""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from autofunc import schedule
from autofunc.errors import ScheduleError, one_of
from autofunc.schedule.registry import GENERATORS

app = typer.Typer(no_args_is_help=True, help="Build, check, simulate and draw pipeline schedules.")

Name = Annotated[str, typer.Argument(metavar="NAME", help="A named schedule, or a file with one line of actions per rank.")]
Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="Named schedules or files; all named ones by default.")]
Ranks = Annotated[int, typer.Option("--ranks", "-p", help="Pipeline ranks.")]
Microbatches = Annotated[int, typer.Option("--microbatches", "-m", help="Microbatches of a step.")]
Stages = Annotated[int | None, typer.Option("--stages-per-rank", "-v", help="Stages on each rank.")]
Forward = Annotated[float, typer.Option("-F", help="Time of a rank's forward of one microbatch.")]
Input = Annotated[float, typer.Option("-I", help="Time of its backward of the input.")]
Weight = Annotated[float, typer.Option("-W", help="Time of its backward of the weights.")]
Comm = Annotated[float, typer.Option("--comm", help="Time of one transfer between ranks.")]


@app.command("list")
def list_names() -> None:
    """The named schedules, and what each is."""
    for name, generator in GENERATORS.items():
        module = inspect.getmodule(generator.row)
        summary = (inspect.getdoc(module) or "").splitlines()[0]
        typer.echo(f"{name:<18}{summary.partition(': ')[2]}")


@app.command()
def show(
    name: Name,
    ranks: Ranks = 4,
    microbatches: Microbatches = 8,
    stages_per_rank: Stages = None,
    lowered: Annotated[bool, typer.Option("--lowered", help="With its sends and receives.")] = False,
) -> None:
    """The table of actions, one line per rank: text that these commands read.

    Example: autofunc schedule show 1f1b -p 2 -m 4 > mine.txt
    """
    s = _read(name, ranks, microbatches, stages_per_rank)
    typer.echo(schedule.to_text(schedule.lower(s) if lowered else s), nl=False)


@app.command()
def simulate(
    name: Name,
    ranks: Ranks = 4,
    microbatches: Microbatches = 8,
    stages_per_rank: Stages = None,
    forward: Forward = 1.0,
    input_: Input = 1.0,
    weight: Weight = 1.0,
    comm: Comm = 0.0,
) -> None:
    """Draw one schedule in time, and its figures.

    Example: autofunc schedule simulate zb_h1 -p 4 -m 8 --comm 0.1
    """
    s = _read(name, ranks, microbatches, stages_per_rank)
    timeline = schedule.simulate(s, _costs(s, forward, input_, weight, comm))
    console = Console()
    sys.stdout.write(
        schedule.draw(timeline, width=console.width, colour=console.is_terminal and not console.no_color) + "\n"
    )
    _print_figures(console, [timeline])


@app.command()
def compare(
    names: Names = [],  # noqa: B006 - typer makes a new one
    ranks: Ranks = 4,
    microbatches: Microbatches = 8,
    stages_per_rank: Stages = None,
    forward: Forward = 1.0,
    input_: Input = 1.0,
    weight: Weight = 1.0,
    comm: Comm = 0.0,
) -> None:
    """Figures of several schedules side by side. `--stages-per-rank` is for those that take more than one.

    Example: autofunc schedule compare 1f1b zb_h1 zb_h2 -p 8 -m 32 -F 1 -I 1.2 -W 0.8
    """
    timelines = []
    for name in names or schedule.names():
        looped = name in GENERATORS and GENERATORS[name].is_looped
        s = _read(name, ranks, microbatches, stages_per_rank if looped else None)
        timelines.append(schedule.simulate(s, _costs(s, forward, input_, weight, comm)))
    _print_figures(Console(), timelines)


def _read(name: str, ranks: int, microbatches: int, stages_per_rank: int | None) -> schedule.Schedule:
    """A named schedule, or one from a file, checked."""
    path = Path(name)
    if path.is_file():
        s = schedule.from_text(path.read_text(encoding="utf-8"), path.stem).compute_form()
    elif path.suffix or os.sep in name:
        near = [str(other) for other in path.parent.glob(f"*{path.suffix}")] if path.parent.is_dir() else []
        raise ScheduleError(f"there is no file {name!r}; {one_of(name, near)}")
    else:
        s = schedule.build(name, num_ranks=ranks, num_microbatches=microbatches, stages_per_rank=stages_per_rank)
    schedule.validate(s)
    return s


def _costs(s: schedule.Schedule, forward: float, input_: float, weight: float, comm: float) -> schedule.Costs:
    """Costs of a stage from those of a rank: stages of a rank share its layers evenly."""
    v = s.num_stages / s.num_ranks
    return schedule.Costs(F=forward / v, I=input_ / v, W=weight / v, comm=comm)


def _print_figures(console: Console, timelines: list[schedule.Timeline]) -> None:
    table = Table()
    for column in ("schedule", "stages", "makespan", "bubble", "span bubble", "activations"):
        table.add_column(column, justify="left" if column == "schedule" else "right")
    for timeline in timelines:
        s = timeline.schedule
        per_rank = max(timeline.peak_activations) * s.num_ranks / s.num_stages
        table.add_row(
            s.name,
            str(s.num_stages),
            f"{timeline.makespan:g}",
            f"{timeline.bubble_fraction:.1%}",
            f"{timeline.span_bubble_fraction:.1%}",
            f"{per_rank:g}",
        )
    console.print(table)
    console.print("activations: most microbatches whose activations a rank holds at once", highlight=False)

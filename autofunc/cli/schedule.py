"""`autofunc schedule`: inspect schedules without torch, processes or a model."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

import autofunc as af
from autofunc.cli.options import CostOptions, Sizes, by_stage, takes_groups
from autofunc.errors import ScheduleError
from autofunc.progress_bar import CONSOLE
from autofunc.shown import literal, shown

app = typer.Typer(no_args_is_help=True, help="Build, check, simulate, search, draw and exchange pipeline schedules.")

_OWN = "a .csv, .txt or .json file (which brings its own sizes), or a function: file.py:name"
Name = Annotated[str, typer.Argument(metavar="NAME", help=f"A named schedule, {_OWN}.")]
Names = Annotated[list[str], typer.Argument(metavar="NAME...", help=f"Named schedules, {_OWN}.")]


@app.command("list")
def list_names() -> None:
    """List the named schedules, with a line about each.

    Example: autofunc schedule list
    """
    from autofunc.schedule.named.registry import GENERATORS

    for name, generator in GENERATORS.items():
        module = inspect.getmodule(generator.row)
        summary = (inspect.getdoc(module) or "").splitlines()[0]
        typer.echo(f"{name:<18}{summary.partition(': ')[2]}")


@app.command()
@takes_groups
def show(
    name: Name,
    sizes: Sizes,
    lowered: Annotated[bool, typer.Option("--lowered", help="Include sends and receives.")] = False,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Write a file: .csv as torch reads it, or .json.")
    ] = None,
) -> None:
    """Print the table of actions, one line per rank, in the text form that these commands read.

    Example: autofunc schedule show 1f1b -p 2 -m 4 -o mine.csv
    """
    s = build(name, sizes)
    s = af.schedule.lower(s, keep_overlapped=True) if lowered else s
    if output is None:
        typer.echo(af.schedule.to_text(s), nl=False)
        return
    af.schedule.write_file(s, output)
    typer.echo(f"wrote {shown(output)}")


@app.command()
@takes_groups
def simulate(name: Name, sizes: Sizes, costs: CostOptions) -> None:
    """Simulate a schedule: draw its timeline, and show figures and why its ranks idle.

    Example: autofunc schedule simulate zb_h1 -p 4 -m 8 --comm 0.1
    """
    console = Console()
    timeline = _simulate(build(name, sizes), costs.read()[0])
    _draw_text(console, timeline)
    _print_figures(console, [timeline])
    _print_idle(console, timeline)


@app.command()
@takes_groups
def compare(sizes: Sizes, costs: CostOptions, names: Names = []) -> None:  # noqa: B006 - typer makes a new one
    """Compare several schedules side by side; by default all named ones.

    `--stages-per-rank` applies to those that take more than one.

    Example: autofunc schedule compare 1f1b zb_h1 zb_h2 -p 8 -m 32 -F 1 -I 1.2 -W 0.8
    """
    (given, _), left_out, timelines = costs.read(), [], []
    for name in names or af.schedule.names():
        try:
            timelines.append(_simulate(build(name, sizes, only_looped=True), given))
        except ScheduleError as error:
            if names:
                raise
            left_out.append(f"left out {name}: {str(error).splitlines()[0]}")
    if not timelines:
        raise ScheduleError("no named schedule fits: " + left_out[0])
    console = Console()
    _print_figures(console, timelines)
    for line in left_out:
        console.print(literal(line))


@app.command()
@takes_groups
def draw(
    names: Names,
    sizes: Sizes,
    costs: CostOptions,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="A picture .svg or .png, a page .html, or a trace for Perfetto .json; by default text.",
        ),
    ] = None,
) -> None:
    """Draw the timelines of schedules, one below the other.

    Example: autofunc schedule draw 1f1b zbv -p 4 -m 8 -o compared.html
    """
    given, _ = costs.read()
    timelines = [_simulate(build(name, sizes, only_looped=True), given) for name in names]
    if output is None:
        for timeline in timelines:
            typer.echo(shown(timeline.schedule.name))
            _draw_text(Console(), timeline)
        return
    af.schedule.draw(timelines, output)
    typer.echo(f"wrote {shown(output)}")


@app.command()
@takes_groups
def search(
    sizes: Sizes,
    costs: CostOptions,
    memory_limit: Annotated[
        float | None,
        typer.Option(
            "--memory-limit", help="Most stage activations per rank; or bytes of residuals if the costs file has memory."
        ),
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", help="How long to search.")] = 10.0,
    span: Annotated[bool, typer.Option("--span", help="Minimise the longest span of a rank, not the makespan.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the random choices.")] = 0,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Write the schedule: .csv or .json.")
    ] = None,
) -> None:
    """Search for a schedule for given costs, unequal stages and a memory limit; never worse than the best named one.

    Example: autofunc schedule search -p 4 -m 16 -F 1,2,1,2 -I 1,2,1,2 -W 1,1,1,1 --memory-limit 6 -o found.csv
    """
    if output is not None:
        af.schedule.check_suffix(output)
        if not Path(output).resolve().parent.is_dir():
            raise ScheduleError(f"cannot write {shown(output)}: there is no such folder")
    given, memory = costs.read()
    listed = {len(cost) for cost in (given.F, given.I, given.W) if not isinstance(cost, (int, float))}
    per_rank = sizes.stages_per_rank or max(max(listed, default=sizes.ranks) // sizes.ranks, 1)
    of_stages = by_stage(given, sizes.ranks, sizes.ranks * per_rank)
    asked: dict[str, Any] = {
        "num_ranks": sizes.ranks,
        "num_microbatches": sizes.microbatches,
        "stages_per_rank": per_rank,
        "memory_limit": memory_limit,
        "memory": memory,
        "objective": "span" if span else "makespan",
    }
    bar = Progress(
        TextColumn("searching"), BarColumn(), TextColumn("best {task.fields[best]:g}"), console=CONSOLE, transient=True,
        disable=not CONSOLE.is_terminal,
    )  # fmt: skip
    with bar:
        task = bar.add_task("", total=seconds, best=float("inf"))
        found = af.schedule.search(
            of_stages,
            **asked,
            time_limit_s=seconds,
            seed=seed,
            on_progress=lambda elapsed, best: bar.update(task, completed=elapsed, best=best),
        )
    timeline = af.schedule.simulate(found, of_stages)
    _draw_text(Console(), timeline)
    _print_figures(Console(), [timeline])
    bound = af.schedule.lower_bound(of_stages, **asked)
    typer.echo(f"{'longest span' if span else 'makespan'} of any schedule of these stages: at least {bound:g}")
    if output is not None:
        af.schedule.write_file(found, output)
        typer.echo(f"wrote {shown(output)}")


def build(name: str, sizes: Sizes, only_looped: bool = False) -> af.schedule.Schedule:
    """Return a checked schedule: a named one, one from a file, or one built by a function.

    A file has its own sizes. With `only_looped`, stages per rank apply only to schedules that take more than one number.
    """
    if Path(name).suffix.lower() in af.schedule.SUFFIXES:
        read = af.schedule.read_file(name)
        try:
            af.schedule.validate(read)
        except ScheduleError as error:
            raise ScheduleError(f"{shown(name)}: {error}") from error
        return read.compute_form()
    source: str | af.schedule.Function = name
    if ".py:" in name:
        from autofunc.config import resolve_target  # named schedules do not need these imports

        source = resolve_target(name, "NAME")
    takes = (
        af.schedule.is_looped(source)
        if isinstance(source, str)
        else "stages_per_rank" in inspect.signature(source).parameters
    )
    fixed = only_looped and not takes
    s = af.schedule.build(
        source,
        num_ranks=sizes.ranks,
        num_microbatches=sizes.microbatches,
        stages_per_rank=None if fixed else sizes.stages_per_rank,
    )
    af.schedule.validate(s)
    return s


def _simulate(s: af.schedule.Schedule, costs: af.schedule.Costs) -> af.schedule.Timeline:
    return af.schedule.simulate(s, by_stage(costs, s.num_ranks, s.num_stages))


def _draw_text(console: Console, timeline: af.schedule.Timeline) -> None:
    colour = console.is_terminal and not console.no_color
    sys.stdout.write(af.schedule.draw(timeline, width=console.width, colour=colour) + "\n")


def _print_figures(console: Console, timelines: list[af.schedule.Timeline]) -> None:
    table = Table()
    for column in ("schedule", "stages", "makespan", "bubble", "span bubble", "activations"):
        table.add_column(column, justify="left" if column == "schedule" else "right")
    for timeline in timelines:
        s = timeline.schedule
        table.add_row(
            literal(shown(s.name)),
            str(s.num_stages),
            f"{timeline.makespan:g}",
            f"{timeline.bubble_fraction:.1%}",
            f"{timeline.span_bubble_fraction:.1%}",
            f"{timeline.peak_microbatches:g}",
        )
    console.print(table)
    console.print("activations: most microbatches whose activations a rank holds at once", highlight=False)


def _print_idle(console: Console, timeline: af.schedule.Timeline) -> None:
    table = Table()
    for column in ("rank", "busy", "idle for: dependency", "communication", "imbalance"):
        table.add_column(column, justify="right")
    for rank, (busy, idle) in enumerate(zip(timeline.busy, af.schedule.explain_idle(timeline), strict=True)):
        table.add_row(str(rank), f"{busy:g}", *(f"{part:g}" for part in idle))
    console.print(table)

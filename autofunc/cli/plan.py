"""`autofunc plan`: a dry run, as tables or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from autofunc.config import read_config
from autofunc.data import STACKED
from autofunc.progress_bar import CONSOLE
from autofunc.row_dims import rows_in_words
from autofunc.schedule import draw
from autofunc.shown import in_ranges, literal, printable, shown, size_in_words
from autofunc.train.axes import Axes
from autofunc.train.connections import assumed
from autofunc.train.fake_data import with_fake_data
from autofunc.train.planning import RunPlan, plan_run


def plan(
    config_path: str, overrides: Sequence[str], num_processes: int | None, measure: bool, as_json: bool,
    picture: str | None, fake_data: bool,
) -> None:  # fmt: skip
    """Print a plan.

    Args:
        config_path: the YAML file.
        overrides: see `config.load_config`.
        num_processes: how many processes the run would have; by default the configuration's number.
        measure: see `plan_run`.
        as_json: print JSON instead of tables.
        picture: a file for the drawn schedule: .svg, .html or .json (a trace).
        fake_data: make up rows instead of reading a dataset.

    Raises:
        AutofuncError: for every mistake in the configuration.
    """
    with CONSOLE.status(literal(f"planning {shown(config_path)}")) as status:
        config, notes = read_config(config_path, overrides)
        config = with_fake_data(config, notes) if fake_data else config
        made = plan_run(
            config, num_processes, notes, measure=measure, on_progress=lambda text: status.update(literal(text))
        )
    if picture is not None:
        draw(made.timeline, picture)
    if as_json:
        sys.stdout.write(json.dumps(made.to_dict(), indent=2) + "\n")
        return
    console = Console(file=sys.stdout)
    for note in made.recipe.notes:
        console.print(literal(f"note: {note}"))
    _show(made, console)
    for line in made.over.described() if made.over is not None else ():
        console.print(literal(line))
    if picture is not None:
        console.print(literal(f"written to {shown(picture)}"))


def _show(made: RunPlan, console: Console) -> None:
    recipe, timeline = made.recipe, made.timeline
    table = Table("stage", "rank", "layers", box=None, pad_edge=False, header_style="bold")
    for title in ("params", "GFLOP", "ms F+B", "sends"):
        table.add_column(title, justify="right")
    for stage in made.stages:
        layers = (
            shown(stage.first_layer)
            if stage.first_layer == stage.last_layer
            else f"{shown(stage.first_layer)} .. {shown(stage.last_layer)}"
        )
        table.add_row(
            str(stage.stage), str(stage.rank), literal(layers), _count(stage.parameters),
            f"{stage.forward_flops / 1e9:.3g}", f"{stage.forward_ms + stage.backward_ms:.3g}",
            size_in_words(stage.sends_bytes) if stage.sends_bytes else "-",
        )  # fmt: skip
    console.print(table, highlight=False)
    memory = Table("rank", box=None, pad_edge=False, header_style="bold")
    for title in ("parameters", "gathered, cast", "optimizer", "activations, gradients", "total"):
        memory.add_column(title, justify="right")
    for rank in made.ranks:
        total = rank.parameter_bytes + rank.gathered_bytes + rank.optimizer_bytes + (rank.activation_bytes or 0)
        peak = "not known" if rank.activation_bytes is None else size_in_words(rank.activation_bytes)
        in_all = size_in_words(total) + (" +" if rank.activation_bytes is None else "")
        memory.add_row(
            str(rank.rank),
            size_in_words(rank.parameter_bytes),
            size_in_words(rank.gathered_bytes) if rank.gathered_bytes else "-",
            size_in_words(rank.optimizer_bytes),
            peak,
            in_all,
        )
    console.print()
    console.print(memory, highlight=False)
    if made.measured:
        times = "layers, measured here"
    elif made.timed is not None:
        times = f"operations, at the rate of {made.timed}, timed here; other layers may differ twofold, --measure times all"
    else:
        times = f"operations, at the rate of a matrix product: a step may take several times as long, for {made.why_not}"
    lines = [
        "",
        f"schedule {shown(recipe.schedule.name)}: {recipe.axes}, {_processes(recipe.axes.num_processes)}, "
        f"{recipe.schedule.num_microbatches} microbatches",
        f"step: {timeline.makespan:.3g} ms, bubble {timeline.bubble_fraction:.1%}; "
        f"longest stage {made.imbalance:.2f}x the mean",
        f"a batch: {rows_in_words(recipe.example(), STACKED, key_name=recipe.model.key_name)}",
        f"times: {times}{_shared_evenly(recipe.axes)}; transfers take no time",
    ]
    if len(made.stages) > 1:
        lines.append(f"split_points: [{', '.join(printable(stage.first_layer) for stage in made.stages[1:])}]")
    lines += _connections(made)
    if recipe.searches:
        lines.append("schedule auto: a better one is searched for when the run starts")
    for line in lines:
        console.print(literal(line))
    sys.stdout.write(draw(recipe.schedule, colour=console.is_terminal and not console.no_color) + "\n")


def _processes(number: int) -> str:
    return f"{number} process{'es' * (number > 1)}"


def _shared_evenly(axes: Axes) -> str:
    sizes = " and ".join(f"{size} {name}" for name, size in (("cp", axes.cp), ("tp", axes.tp)) if size > 1)
    return f"; {sizes} ranks are assumed to share them evenly" if sizes else ""


def _connections(made: RunPlan) -> list[str]:
    """Describe how many connections each rank makes, and their share of its GPU."""
    alike: dict[int, list[int]] = {}
    for rank in made.ranks:
        alike.setdefault(rank.connections, []).append(rank.rank)
    if not any(alike):
        return []
    counts = [f"{count} on rank{'s' if len(ranks) > 1 else ''} {in_ranges(ranks)}" for count, ranks in alike.items()]
    lines = [f"connections between pp ranks, each one way: {'; '.join(counts)}"]
    most = max(rank.connection_bytes or 0 for rank in made.ranks)
    if most:
        lines.append(f"they take at most {size_in_words(most)} of a GPU, {assumed(made.recipe.transfers)}")
    return lines


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)

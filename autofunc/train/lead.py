"""The processes of a run: the first one prints and writes results, the others take part."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch.distributed.device_mesh import DeviceMesh

from autofunc import tree
from autofunc.automodel import write_pretrained
from autofunc.checkpoint.write import of_first
from autofunc.config import FinetuneConfig
from autofunc.config.validations import display_name
from autofunc.explain import explain
from autofunc.schedule import write_file
from autofunc.shown import literal, printable, size_in_words
from autofunc.splitting import parameter_count
from autofunc.train.adapters import described
from autofunc.train.autoschedule import find_schedule
from autofunc.train.average import in_place
from autofunc.train.checkpoints import Checkpoints
from autofunc.train.curves import draw_curves
from autofunc.train.datasets import title
from autofunc.train.logs import bar_console, line_console, show_last
from autofunc.train.loop import TrainResult, train
from autofunc.train.output import LOGS, METRICS, PAGE, PICTURE, SCHEDULE, of_average
from autofunc.train.page import make_page
from autofunc.train.progress import ProgressReporter, Silent
from autofunc.train.recipe import Recipe
from autofunc.train.records import Records
from autofunc.train.resume import folder_of, source, step_at
from autofunc.train.step_folders import name_of
from autofunc.train.tokenizers import keep_tokenizer
from autofunc.train.trackers import open_trackers
from autofunc.train.watched import watched
from autofunc.train.weights import save_result, written_part
from autofunc.tree import Nested


def follow(
    recipe: Recipe, mesh: DeviceMesh, device: torch.device, output_dir: Path, config: FinetuneConfig
) -> None:  # fmt: skip
    """Run any rank but the first.

    Args:
        recipe: of the run.
        mesh: of all ranks.
        device: of this rank.
        output_dir: for results.
        config: the recipe's configuration.
    """
    if recipe.searches:
        recipe = replace(recipe, schedule=find_schedule(recipe, mesh, device, None).schedule)
    begun_from, checkpoints = _checkpoints(config, output_dir, lambda _: None)
    with watched(config.distributed):
        result = train(recipe, mesh, device, Silent(), None, checkpoints, begun_from)
    if not result.stopped:
        for params, _ in _trees(result):
            _whole(recipe, config, result, params)


def _checkpoints(
    config: FinetuneConfig, output_dir: Path, show: Callable[[str], None]
) -> tuple[Path | None, Checkpoints | None]:
    """Return the checkpoint to resume from, as seen by the first rank, and the writer of checkpoints."""
    section = config.checkpoint
    begun_from = of_first(source(section, output_dir))
    if section is None or not section.enabled:
        return begun_from, None
    return begun_from, Checkpoints(folder_of(section, output_dir), section, config.step_scheduler, show)


def _writes_weights(config: FinetuneConfig) -> bool:
    return config.checkpoint is None or config.checkpoint.save_consolidated is not False


def _trees(result: TrainResult) -> Iterator[tuple[Nested, Callable[[str], str]]]:
    """Yield the trees this rank trained, each with a function that names its files."""
    yield result.params, str
    if result.average is not None:
        yield in_place(result.average, result.params), of_average


def _whole(recipe: Recipe, config: FinetuneConfig, result: TrainResult, params: Nested) -> tuple[Nested, Nested]:
    """Gather one of `_trees` on the first rank, as far as it is written. All ranks call it."""
    pipe = result.pipe
    if config.export is None:
        params = written_part(recipe.model, params) if _writes_weights(config) else {}
    return pipe.collect(params), pipe.collect(result.state)


def lead(
    recipe: Recipe, mesh: DeviceMesh | None, device: torch.device, output_dir: Path, config: FinetuneConfig, command: str
) -> None:
    """Run the first rank, and show and write results.

    Args:
        recipe: of the run.
        mesh: of all ranks; None with a single process.
        device: of this rank.
        output_dir: for results.
        config: the recipe's configuration.
        command: resumes the run after it was told to end.
    """
    console = line_console()

    def show(text: str) -> None:
        console.print(literal(text))

    _announce(recipe, mesh, device, show)
    if recipe.searches and mesh is not None:
        recipe = _searched(recipe, mesh, device, output_dir, show)
    colour = console.is_terminal and not console.no_color
    sys.stdout.write(explain(recipe.stages, recipe.schedule, colour=colour) + "\n")  # coloured already
    sys.stdout.flush()

    begun_from, checkpoints = _checkpoints(config, output_dir, show)
    done = step_at(begun_from)
    if begun_from is not None:
        show(f"resuming from {begun_from}, after step {done}")
    trackers = open_trackers(config, output_dir, done)
    with (
        Records(output_dir, done, trackers, config.step_scheduler.log_remote_every_steps, show) as metrics,
        ProgressReporter(console, recipe.num_steps) as reporter,
        watched(config.distributed),  # not while writing weights, which has no time limit
    ):
        result = train(recipe, mesh, device, reporter, metrics, checkpoints, begun_from)
    saved = _save(recipe, config, result, output_dir)
    peaks = result.peak_memory_bytes
    most = size_in_words(max(peaks)) + (f" on rank {peaks.index(max(peaks))}" if len(peaks) > 1 else "")
    show(f"{result.num_steps - done} steps in {result.training_seconds:.1f} s of training, peak memory {most}")
    if metrics.error is not None:
        show(f"{METRICS} lacks lines: {metrics.error}")
    _draw(recipe, config, result, output_dir, device, show)
    left = [name for name in (METRICS, PICTURE, PAGE) if (output_dir / name).is_file()]
    logs = [f"{LOGS}/"] if (output_dir / LOGS).is_dir() else []
    last = [f"written to {output_dir}: {', '.join([*left, *saved, *logs])}"]
    if checkpoints is not None:
        last.append(f"checkpoints: {checkpoints.folder}, the latest {name_of(result.num_steps)}")
    _end(last + _outcome(recipe, result), command if result.stopped else None, console)


def _announce(recipe: Recipe, mesh: DeviceMesh | None, device: torch.device, show: Callable[[str], None]) -> None:
    """Show what is trained, and on what."""
    for note in recipe.notes:
        show(f"note: {note}")
    show(f"model: {parameter_count(recipe.model):,} parameters on {device.type}")
    trained = described(recipe.model)
    if trained is not None:
        show(trained)
    if mesh is not None:
        show(f"mesh: {recipe.axes}, {recipe.axes.num_processes} processes")
    show(f"data: {title(recipe.dataset)}")
    for section, dataset in recipe.validation_datasets.items():
        show(f"{display_name(section)}: {title(dataset)}")


def _searched(
    recipe: Recipe, mesh: DeviceMesh, device: torch.device, output_dir: Path, show: Callable[[str], None]
) -> Recipe:
    """Return the recipe with the schedule that the search found."""
    found = find_schedule(recipe, mesh, device, bar_console())
    for line in found.report():
        show(line)
    write_file(found.schedule, output_dir / SCHEDULE)
    show(f"written to {output_dir / SCHEDULE}; distributed.schedule takes this file to reuse it")
    return replace(recipe, schedule=found.schedule)


def _save(recipe: Recipe, config: FinetuneConfig, result: TrainResult, output_dir: Path) -> list[str]:
    """Write trained weights; return the names of the files."""
    if result.stopped:
        return []
    saved: list[str] = []
    for own, named in _trees(result):
        params, state = _whole(recipe, config, result, own)
        if _writes_weights(config):  # first, because other writes may fail
            saved += save_result(recipe.model, written_part(recipe.model, params), state, output_dir, named)
        if config.export is not None:
            folder = named(config.export)
            write_pretrained(recipe.model, {**tree.flatten(params), **tree.flatten(state)}, output_dir / folder)
            keep_tokenizer(recipe.dataset, output_dir / folder)
            saved.append(f"{folder}/")
    return saved


def _draw(
    recipe: Recipe, config: FinetuneConfig, result: TrainResult, output_dir: Path, device: torch.device,
    show: Callable[[str], None],
) -> None:  # fmt: skip
    """Draw the curves and the run's page. A failure is shown and does not end the run."""
    curves = None
    try:
        curves = draw_curves(output_dir / METRICS, recipe.validation_datasets)
        (output_dir / PICTURE).write_bytes(curves)
    except (OSError, ValueError) as error:
        show(f"{PICTURE} could not be drawn: {error}")
    try:
        page = make_page(recipe, config, result, output_dir, device, curves)
        (output_dir / PAGE).write_text(page, encoding="utf-8")
    except (OSError, ValueError) as error:
        show(f"{PAGE} could not be written: {error}")


def _outcome(recipe: Recipe, result: TrainResult) -> list[str]:
    """Return the closing lines of a run."""
    if result.stopped:
        return [f"told to end by SIGTERM, after step {result.num_steps} of {recipe.num_steps}. To resume:"]
    found = []
    if result.ended_early:
        found.append(f"ended after step {result.num_steps} of {recipe.num_steps}: the validation loss stopped improving")
    if result.validated is not None:
        found.append(result.validated.text())
    elif recipe.validation_datasets:
        found.append(f"validation loss: none, because no row of {' and '.join(recipe.validation_datasets)} has a label")
    return found


def _end(lines: list[str], command: str | None, console: Console) -> None:
    """Show the closing lines, of which a quiet run shows only the last, and the command that resumes the run."""
    for line in lines[:-1]:
        console.print(literal(line))
    show_last(lines[-1])
    if command is not None:
        show_last(f"  {printable(command)}")  # on one line, to copy

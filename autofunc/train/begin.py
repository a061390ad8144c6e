"""Start a configured run: check it, then train in this process or start workers."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

from autofunc.config import FinetuneConfig
from autofunc.errors import ConfigError
from autofunc.timing import clock
from autofunc.train.device import check_devices, on_gpus
from autofunc.train.evaluate import check_evaluation, evaluate, to_evaluate
from autofunc.train.flight_recorder import FlightRecorder
from autofunc.train.fork_server import ForkServer
from autofunc.train.generating import check_texts, generate_texts
from autofunc.train.launch import launch
from autofunc.train.logs import kept_log, log_alone
from autofunc.train.memory_budget import check_budget
from autofunc.train.output import default_output_dir, last_output_dir, make_output_dir
from autofunc.train.recipe import Recipe, prepare
from autofunc.train.resume import AUTO, check_restorable, folder_of, goes_on_in, source, wanted
from autofunc.train.role import was_checked
from autofunc.train.run import in_mesh, run
from autofunc.train.step_folders import LATEST
from autofunc.train.tensor_parallel_check import check_tensor_parallel
from autofunc.train.texts import TextsWanted
from autofunc.train.trackers import check_trackers
from autofunc.train.worker import run_worker

_SECONDS_TO_END = 30.0  # grace period of workers that write no checkpoints


@dataclass(frozen=True)
class Asked:
    """A command's request."""

    config: FinetuneConfig
    notes: tuple[str, ...]  # already known, to be shown to the user
    output_dir: Path
    command: str  # that resumes the run
    overwrite: bool  # replace an existing run
    max_restarts: int = 0
    evaluates: bool = False  # instead of training
    as_json: bool = False
    quiet: bool = False  # print errors and the last line only
    texts: TextsWanted | None = None  # to generate instead of training

    @property
    def trains(self) -> bool:
        """Whether the run trains weights and writes them."""
        return not self.evaluates and self.texts is None


def asked(
    config: FinetuneConfig,
    notes: Sequence[str],
    words: Sequence[str],
    config_path: str,
    *,
    overwrite: bool,
    max_restarts: int = 0,
    evaluates: bool = False,
    as_json: bool = False,
    quiet: bool = False,
    texts: TextsWanted | None = None,
) -> Asked:
    """Return a command's request.

    Args:
        config: the configuration.
        notes: already known, to be shown to the user.
        words: of the command.
        config_path: the configuration's file.
        overwrite: replace an existing run.
        max_restarts: how often to restart workers.
        evaluates: evaluate instead of training.
        as_json: print results as JSON.
        quiet: print errors and the last line only.
        texts: to generate instead of training.

    Raises:
        ConfigError: for restarts without checkpoints, and for packages that are not installed.
    """
    if max_restarts and (config.checkpoint is None or not config.checkpoint.enabled):
        raise ConfigError(
            f"--max-restarts {max_restarts} resumes from checkpoints: add a section checkpoint, which may be empty "
            "(checkpoint: {}), and set step_scheduler.ckpt_every_steps"
        )
    if not evaluates and texts is None:
        check_trackers(config)
    folder = output_dir_of(config, config_path)
    if evaluates:
        config = to_evaluate(config)
    typed = list(words) if config.output_dir is not None else [*words, "--output_dir", str(folder)]
    if wanted(config.checkpoint) not in (LATEST, AUTO):
        typed += ["--checkpoint.restore_from", LATEST]
    return Asked(config, tuple(notes), folder, shlex.join(typed), overwrite, max_restarts, evaluates, as_json, quiet, texts)


def checked_recipe(config: FinetuneConfig, nproc_per_node: int | None, notes: Sequence[str]) -> Recipe:
    """Build a run and try it without starting its processes.

    Args:
        config: the configuration.
        nproc_per_node: processes to start; by default the configured number.
        notes: already known, to be shown to the user.

    Raises:
        AutofuncError: for any mistake in the configuration.
    """
    recipe = prepare(config, nproc_per_node, notes=notes)
    check_tensor_parallel(recipe)
    check_budget(recipe)
    check_devices(config.distributed.device, recipe.axes.num_processes)
    return recipe


def begin(recipe: Recipe, run_asked: Asked, server: ForkServer | None) -> None:
    """Train in this process if one is enough, else in forked workers.

    Args:
        recipe: from `checked_recipe`.
        run_asked: the request it was built from.
        server: forks the workers; None if one process is enough.
    """
    begun_from = source(run_asked.config.checkpoint, run_asked.output_dir, writes=run_asked.trains)
    if run_asked.evaluates:
        check_evaluation(recipe, begun_from)
    elif run_asked.texts is not None:
        check_texts(recipe, run_asked.texts)
    else:
        if begun_from is not None:
            check_restorable(begun_from, recipe)
        _make_output_dir(run_asked, begun_from)
    if recipe.axes.num_processes == 1 and not run_asked.max_restarts:
        _run(recipe, run_asked)
        return
    assert server is not None
    if not (run_asked.as_json or run_asked.quiet) and run_asked.texts is None:
        sys.stdout.write(f"starting {recipe.axes.num_processes} processes\n")
        sys.stdout.flush()
    config = run_asked.config
    writes = config.checkpoint is not None and config.checkpoint.enabled  # and may need long to finish
    launch(
        server, recipe.axes.num_processes, partial(_as_worker, run_asked, clock.began), max_restarts=run_asked.max_restarts,
        folder=run_asked.output_dir if run_asked.trains else None,
        seconds_to_end=60 * config.distributed.timeout_minutes if writes else _SECONDS_TO_END,
        recorder=FlightRecorder(run_asked.output_dir) if run_asked.trains and on_gpus(config.distributed.device) else None,
    )  # fmt: skip


def _as_worker(run_asked: Asked, began: float) -> None:
    clock.becomes(int(os.environ["RANK"]), began)
    rank = int(os.environ["RANK"])

    def work() -> None:
        with kept_log(run_asked.output_dir, rank, quiet=run_asked.quiet) if run_asked.trains else nullcontext():
            run_rank(run_asked)

    run_worker(work)


def run_rank(run_asked: Asked) -> None:
    """Run one rank's part."""
    with log_alone() if was_checked() else nullcontext():  # the check has shown its output already
        recipe = prepare(run_asked.config, int(os.environ["WORLD_SIZE"]), notes=run_asked.notes, checked=was_checked())
    is_writer = not was_checked() and os.environ.get("RANK", "0") == "0" and run_asked.trains
    if is_writer:
        _make_output_dir(run_asked, source(run_asked.config.checkpoint, run_asked.output_dir))
    _run(recipe, run_asked)


def _run(recipe: Recipe, run_asked: Asked) -> None:
    config, folder = run_asked.config, run_asked.output_dir
    if run_asked.trains:
        run(recipe, config, folder, run_asked.command, quiet=run_asked.quiet)
        return

    def work(mesh: DeviceMesh | None, device: torch.device, folder: Path) -> None:
        if run_asked.texts is not None:
            generate_texts(recipe, mesh, device, folder, config, run_asked.texts)
            return
        evaluate(recipe, mesh, device, folder, config, run_asked.as_json)

    in_mesh(recipe, config, folder, work)


def _make_output_dir(run_asked: Asked, begun_from: Path | None) -> None:
    section = run_asked.config.checkpoint
    folder = folder_of(section, run_asked.output_dir)
    # AUTO starts over if a run ended before its first checkpoint
    overwrite = run_asked.overwrite or (wanted(section) == AUTO and begun_from is None)
    make_output_dir(run_asked.output_dir, overwrite, folder, goes_on=goes_on_in(folder, begun_from))


def output_dir_of(config: FinetuneConfig, config_path: str) -> Path:
    """Return the output folder: as configured, else a new one named after the file, else the one to resume in."""
    if config.output_dir is not None:
        return Path(config.output_dir).expanduser()
    return last_output_dir(config_path) if wanted(config.checkpoint) else default_output_dir(config_path)

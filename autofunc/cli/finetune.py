"""`autofunc finetune llm`: check, then train in this process or start the workers."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from autofunc.config import FinetuneConfig, read_config
from autofunc.shown import literal, shown
from autofunc.train.device import check_devices
from autofunc.train.launch import is_worker, launch, was_checked
from autofunc.train.memory_budget import check_budget
from autofunc.train.output import default_output_dir, last_output_dir, make_output_dir
from autofunc.train.recipe import prepare
from autofunc.train.resume import AUTO, check_restorable, folder_of, goes_on_in, source, wanted
from autofunc.train.run import run
from autofunc.train.step_folders import LATEST
from autofunc.train.tensor_parallel_check import check_tensor_parallel
from autofunc.train.worker import run_worker

_OUTPUT_DIR = "AUTOFUNC_OUTPUT_DIR"  # chosen once, by the process that starts the workers


def finetune_llm(config_path: str, overrides: Sequence[str], nproc_per_node: int | None, overwrite: bool) -> None:
    """Run a configuration.

    Args:
        config_path: the YAML file.
        overrides: see `config.load_config`.
        nproc_per_node: processes to start; the configuration's own number by default.
        overwrite: whether a run in the same output folder is replaced.

    Raises:
        AutofuncError: for every mistake in the configuration, before a process is started.
    """
    if is_worker():
        run_worker(lambda: _work(config_path, overrides, overwrite))
        return
    with Console(stderr=True).status(literal(f"checking {shown(config_path)}")):  # reads the data; shown on terminals
        config, notes = read_config(config_path, overrides)
        recipe = prepare(config, nproc_per_node, notes=notes)
        check_tensor_parallel(recipe)
        check_budget(recipe)
        check_devices(config.distributed.device, recipe.axes.num_processes)
        output_dir = _output_dir(config, config_path)
        begun_from = source(config.checkpoint, output_dir)
        if begun_from is not None:
            check_restorable(begun_from, recipe)
    _make_output_dir(config, output_dir, begun_from, overwrite)
    if recipe.axes.num_processes == 1:
        run(recipe, config, output_dir, _command(config, config_path, overrides, output_dir))
        return
    sys.stdout.write(f"starting {recipe.axes.num_processes} processes\n")
    sys.stdout.flush()
    arguments = ["finetune", "llm", "-c", config_path, *overrides]
    launch(recipe.axes.num_processes, arguments, {_OUTPUT_DIR: str(output_dir)})


def _work(config_path: str, overrides: Sequence[str], overwrite: bool) -> None:
    config, notes = read_config(config_path, overrides)
    recipe = prepare(config, int(os.environ["WORLD_SIZE"]), notes=notes, checked=was_checked())
    output_dir = _output_dir(config, config_path)
    if not was_checked() and os.environ.get("RANK", "0") == "0":  # the one that writes
        begun_from = source(config.checkpoint, output_dir)
        _make_output_dir(config, output_dir, begun_from, overwrite)
    run(recipe, config, output_dir, _command(config, config_path, overrides, output_dir))


def _output_dir(config: FinetuneConfig, config_path: str) -> Path:
    """Where results go: where the run before has left its own, if this one goes on from there."""
    if config.output_dir is not None:
        return Path(config.output_dir).expanduser()
    chosen = os.environ.get(_OUTPUT_DIR)
    if chosen:
        return Path(chosen)
    return last_output_dir(config_path) if wanted(config.checkpoint) else default_output_dir(config_path)


def _make_output_dir(config: FinetuneConfig, output_dir: Path, begun_from: Path | None, overwrite: bool) -> None:
    folder = folder_of(config.checkpoint, output_dir)
    # AUTO begins anew where a run was ended before its first checkpoint
    begins_again = wanted(config.checkpoint) == AUTO and begun_from is None
    make_output_dir(output_dir, overwrite or begins_again, folder, goes_on=goes_on_in(folder, begun_from))


def _command(config: FinetuneConfig, config_path: str, overrides: Sequence[str], output_dir: Path) -> str:
    """What to type to go on with this run when it was ended."""
    words = ["autofunc", "finetune", "llm", "-c", config_path, *overrides]
    if config.output_dir is None:
        words += ["--output_dir", str(output_dir)]
    if wanted(config.checkpoint) not in (LATEST, AUTO):
        words += ["--checkpoint.restore_from", LATEST]
    return shlex.join(words)

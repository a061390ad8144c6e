"""`autofunc finetune llm`: check, then train in this process or start the workers."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from autofunc.config import read_config
from autofunc.shown import literal, shown
from autofunc.train.device import check_devices
from autofunc.train.launch import is_worker, launch, was_checked
from autofunc.train.memory_budget import check_budget
from autofunc.train.output import default_output_dir, make_output_dir
from autofunc.train.recipe import prepare
from autofunc.train.run import run
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
    output_dir = _output_dir(config.output_dir, config_path)
    make_output_dir(output_dir, overwrite)
    if recipe.axes.num_processes == 1:
        run(recipe, config, output_dir)
        return
    sys.stdout.write(f"starting {recipe.axes.num_processes} processes\n")
    sys.stdout.flush()
    arguments = ["finetune", "llm", "-c", config_path, *overrides]
    launch(recipe.axes.num_processes, arguments, {_OUTPUT_DIR: str(output_dir)})


def _work(config_path: str, overrides: Sequence[str], overwrite: bool) -> None:
    config, notes = read_config(config_path, overrides)
    recipe = prepare(config, int(os.environ["WORLD_SIZE"]), notes=notes, checked=was_checked())
    output_dir = _output_dir(config.output_dir, config_path)
    if not was_checked() and os.environ.get("RANK", "0") == "0":  # the one that writes
        make_output_dir(output_dir, overwrite)
    run(recipe, config, output_dir)


def _output_dir(configured: str | None, config_path: str) -> Path:
    if configured is not None:
        return Path(configured).expanduser()
    chosen = os.environ.get(_OUTPUT_DIR)
    return Path(chosen) if chosen else default_output_dir(config_path)

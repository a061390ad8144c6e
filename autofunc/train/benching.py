"""`autofunc bench`: benchmark a configuration's model, data and precision on the processes of a run."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from autofunc.batch import split_batch
from autofunc.benchmark import Grid, Results, bench
from autofunc.benchmark.subject import cut_by_costs
from autofunc.config import FinetuneConfig
from autofunc.data import STACKED
from autofunc.errors import BatchError, ConfigError, PipelineRunError
from autofunc.runtime.pair_groups import disconnect_all
from autofunc.schedule import is_named
from autofunc.shown import literal, shown
from autofunc.timing import clock
from autofunc.train.device import check_devices, on_gpus, take_device
from autofunc.train.fork_server import ForkServer
from autofunc.train.launch import launch
from autofunc.train.layout import count_microbatches, is_auto
from autofunc.train.logs import line_console, log_alone
from autofunc.train.output import default_output_dir, make_output_dir
from autofunc.train.recipe import Recipe, prepare
from autofunc.train.role import was_checked
from autofunc.train.run import join
from autofunc.train.threads import threads
from autofunc.train.worker import run_worker

USUAL = ("gpipe", "1f1b", "zb_h1")
"""Schedules that are measured besides the file's own, if the command names none."""


@dataclass(frozen=True)
class BenchWanted:
    """The command's choices; None means the file's."""

    schedules: tuple[str, ...] | None = None
    engines: tuple[str, ...] | None = None
    compile: tuple[bool | str, ...] | None = None
    pp: tuple[int, ...] | None = None
    microbatches: tuple[int, ...] | None = None
    remat: tuple[str | None, ...] | None = None
    against: tuple[str, ...] = ()
    torch_schedules: tuple[str, ...] = ()
    only: tuple[str, ...] = ("*",)
    repetitions: int = 9
    steps: int = 1
    seconds: float = 120.0
    checks: bool = True
    drops: bool = True  # whether dropout is on
    output: str | None = None
    as_json: bool = False


@dataclass(frozen=True)
class BenchAsked:
    """A benchmark to run."""

    config: FinetuneConfig  # of one pipeline rank, see `for_benchmark`
    split_points: tuple[str, ...] | None
    grid: Grid
    wanted: BenchWanted
    notes: tuple[str, ...]
    output: Path


def asked_bench(config: FinetuneConfig, notes: Sequence[str], wanted: BenchWanted, config_path: str) -> BenchAsked:
    """Return the benchmark that a command asks for.

    Args:
        config: the file's configuration.
        notes: already known, to be shown to the user.
        wanted: the command's choices.
        config_path: the file.

    Raises:
        AutofuncError: for unknown choices, or anything a benchmark does not measure.
    """
    all_notes, grid = list(notes), grid_of(config, wanted)
    points = config.distributed.split_points
    output = Path(wanted.output) if wanted.output is not None else default_output_dir(f"bench_{Path(config_path).stem}")
    return BenchAsked(
        for_benchmark(config, all_notes), tuple(points) if isinstance(points, list) else None, grid, wanted,
        tuple(all_notes), output,
    )  # fmt: skip


def grid_of(config: FinetuneConfig, wanted: BenchWanted) -> Grid:
    """Return the command's choices, completed by the file's.

    Raises:
        AutofuncError: for unknown choices.
    """
    given = config.distributed
    own = () if is_auto(config) or not is_named(given.schedule) else (given.schedule,)
    remat = None if given.remat == "auto" else given.remat
    return Grid(
        schedules=wanted.schedules or tuple(dict.fromkeys((*USUAL, *own))),
        pp=wanted.pp or (max(given.pp_size, 2),),
        microbatches=wanted.microbatches or (count_microbatches(config, _replicas(config)),),
        engines=wanted.engines or (given.engine,),
        compile=wanted.compile or (given.compile,),
        remat=wanted.remat or (remat,),
        against=wanted.against,
        torch_schedules=wanted.torch_schedules,
    )


def _replicas(config: FinetuneConfig) -> int:
    return config.distributed.dp_size or config.distributed.dp_replicate_size or 1


def for_benchmark(config: FinetuneConfig, notes: list[str]) -> FinetuneConfig:
    """Return the configuration on one process, without anything that the grid chooses.

    Args:
        config: the file's configuration.
        notes: gains a line for each choice left out.

    Raises:
        ConfigError: for axes that change what stages compute.
    """
    given = config.distributed
    for name in ("tp_size", "cp_size", "ep_size"):
        if getattr(given, name) > 1:
            raise ConfigError(f"bench measures pp only, but distributed.{name} is {getattr(given, name)}; set it to 1")
    replicas = _replicas(config)
    if replicas > 1:
        notes.append(f"bench measures one of the {replicas} data parallel pipelines, on its share of the rows")
    alone: dict[str, Any] = {
        "pp_size": 1, "dp_size": None, "dp_replicate_size": None, "split_points": None, "schedule": "1f1b",
        "engine": "graph", "compile": False, "remat": None, "memory_budget": None, "offload_policy": None,
    }  # fmt: skip
    steps = config.step_scheduler
    rows = {"global_batch_size": steps.global_batch_size // replicas}
    return config.model_copy(
        update={
            "distributed": given.model_copy(update=alone),
            "step_scheduler": steps.model_copy(update=rows),
            "validation_dataset": None,
            "metrics": {},
            "early_stopping": None,
            "export": None,
        }
    )


def processes_of(run: BenchAsked, nproc_per_node: int | None) -> int:
    """Return the number of processes: as requested, or one per pp rank if each has a device, else one.

    Raises:
        MeshError: if there are fewer GPUs than processes.
    """
    wanted, most = run.config.distributed.device, max(run.grid.pp)
    if nproc_per_node is not None:
        check_devices(wanted, nproc_per_node)
        return nproc_per_node
    return 1 if on_gpus(wanted) and torch.cuda.device_count() < most else most


def begin_bench(run: BenchAsked, nproc_per_node: int | None, server: ForkServer | None) -> None:
    """Check a benchmark, then run it here if one process is enough, else in forked processes.

    Args:
        run: the benchmark.
        nproc_per_node: processes to start.
        server: forks the processes; None if one is enough.

    Raises:
        AutofuncError: for every mistake in the configuration, before a process is started.
    """
    processes = processes_of(run, nproc_per_node)
    contenders, _ = run.grid.contenders(processes, run.wanted.only)
    recipe = prepare(run.config, 1, notes=run.notes)
    _check_rows(recipe, run.grid)
    make_output_dir(run.output, overwrite=False, goes_on=True)
    if not run.wanted.as_json:
        console = line_console()
        for note in recipe.notes:
            console.print(literal(f"note: {note}"))
        console.print(
            literal(
                f"{len(contenders)} contender{'s' * (len(contenders) > 1)} on {processes} process{'es' * (processes > 1)}"
            )
        )
    if processes == 1:
        _run(recipe, run)
        return
    assert server is not None, "there are several processes"
    launch(server, processes, partial(_as_worker, run, clock.began))


def _check_rows(recipe: Recipe, grid: Grid) -> None:
    """Refuse numbers of microbatches that do not divide a step's rows.

    Raises:
        ConfigError: naming those that do.
    """
    for number in grid.microbatches:
        try:
            split_batch(recipe.example(), number, batch_dims=STACKED, key_name=recipe.model.key_name)
        except BatchError as error:
            raise ConfigError(f"bench, --microbatches {number}: {error}") from error


def _as_worker(run: BenchAsked, began: float) -> None:
    clock.becomes(int(os.environ["RANK"]), began)
    run_worker(partial(run_bench_rank, run))


def run_bench_rank(run: BenchAsked) -> None:
    """Run one process's part of a benchmark."""
    with log_alone() if was_checked() or os.environ["RANK"] != "0" else nullcontext():
        recipe = prepare(run.config, 1, notes=run.notes, checked=was_checked())
    _run(recipe, run)


def _run(recipe: Recipe, run: BenchAsked) -> None:
    config, wanted = run.config, run.wanted
    device = take_device(config.distributed.device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        join(device, config.distributed.timeout_minutes)
    is_first = os.environ.get("RANK", "0") == "0"
    key = (recipe.seed, 1) if wanted.drops else None
    with threads(config.distributed.threads_per_rank):
        model, grid = recipe.model, run.grid
        batch = {name: leaf.to(device) for name, leaf in recipe.example().items()}
        results = bench(
            model, batch, loss=recipe.loss, schedules=grid.schedules, pp=grid.pp, microbatches=grid.microbatches,
            engines=grid.engines, compile=grid.compile, remat=grid.remat, against=grid.against,
            torch_schedules=grid.torch_schedules, only=wanted.only,
            split_points=cut_by_costs(model, run.split_points, recipe.microbatch((recipe.seed, 1)), recipe.loss),
            params=model.init(recipe.init_seed, device=device), key=key, batch_dims=STACKED,
            sharding=recipe.sharding, repetitions=wanted.repetitions, steps=wanted.steps, seconds=wanted.seconds,
            check=wanted.checks, peak=None if recipe.peak_tflops is None else recipe.peak_tflops * 1e12,
        )  # fmt: skip
    if dist.is_initialized():
        disconnect_all()
        dist.destroy_process_group()
    if is_first:
        _report(results, run)


def _report(results: Results, run: BenchAsked) -> None:
    """Print and write the results.

    Raises:
        PipelineRunError: if a contender's gradients were wrong.
        ConfigError: if the folder cannot be written.
    """
    try:
        written = results.save(run.output) if results.measured else []
    except OSError as error:
        raise ConfigError(f"bench: cannot write into {shown(run.output)}: {error.strerror or error}") from error
    console = line_console()
    if run.wanted.as_json:
        sys.stdout.write(json.dumps(results.to_dict(), indent=2) + "\n")
    else:
        sys.stdout.write(results.table(colour=console.is_terminal and not console.no_color) + "\n")
        if written:
            console.print(literal(f"written: {', '.join(shown(each) for each in written)}"))
    sys.stdout.flush()
    wrong = [each for each in results.left_out if each.wrong]
    if wrong:
        raise PipelineRunError("; ".join(f"{each.name}: {each.why}" for each in wrong))

"""`autofunc bench`: the part that runs before torch, which takes seconds to import. The rest is `train.benching`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import typer

from autofunc.cli import train as train_command
from autofunc.cli.loading import loading_torch
from autofunc.cli.options import StartOptions
from autofunc.config import read_config
from autofunc.errors import ConfigError, one_of
from autofunc.progress_bar import CONSOLE
from autofunc.shown import literal, shown
from autofunc.train.role import is_worker

T = TypeVar("T")

_COMPILE: dict[str, bool | str] = {"off": False, "on": True, "graphs": "graphs", "inductor+graphs": "inductor+graphs"}
_REMAT: dict[str, str | None] = {"none": None, "layer": "layer", "stage": "stage"}


@dataclass(frozen=True)
class BenchOptions(StartOptions):
    """What to measure, and for how long."""

    schedules: Annotated[
        str | None, typer.Option("--schedules", metavar="A,B", help="Named schedules, or files of schedules.")
    ] = None
    engines: Annotated[str | None, typer.Option("--engines", metavar="A,B", help="graph, eager.")] = None
    compile: Annotated[
        str | None, typer.Option("--compile", metavar="A,B", help="off, on; on GPUs also graphs, inductor+graphs.")
    ] = None
    pp: Annotated[str | None, typer.Option("--pp", metavar="1,2", help="Numbers of pipeline ranks.")] = None
    microbatches: Annotated[
        str | None, typer.Option("--microbatches", metavar="4,8", help="Numbers of microbatches per step.")
    ] = None
    remat: Annotated[str | None, typer.Option("--remat", metavar="A,B", help="none, layer, stage.")] = None
    against: Annotated[
        str | None, typer.Option("--against", metavar="A,B", help="torch: its own pipelines; plain: the microbatch loop.")
    ] = None
    torch_schedules: Annotated[
        str | None, typer.Option("--torch-schedules", metavar="A,B", help="Torch's names, instead of counterparts.")
    ] = None
    only: Annotated[
        str | None, typer.Option("--only", metavar="A,B", help="Only names that match: 'torch *,* compiled'.")
    ] = None
    repetitions: Annotated[int, typer.Option("--repetitions", min=1, help="Rounds; each contender has a turn.")] = 9
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps per turn; their median counts.")] = 1
    seconds: Annotated[
        float, typer.Option("--seconds", min=0, help="Start no new round after this, except the first three.")
    ] = 120.0
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Skip comparing gradients, which runs the whole model on each process.")
    ] = False
    no_dropout: Annotated[
        bool, typer.Option("--no-dropout", help="Turn dropout off: compiling random numbers takes minutes.")
    ] = False
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FOLDER", help="For results; by default one in runs/.")
    ] = None
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of tables.")] = False


def bench(options: BenchOptions, overrides: Sequence[str]) -> None:
    """Run a benchmark.

    Args:
        options: the command's options.
        overrides: see `config.load_config`.

    Raises:
        AutofuncError: for every mistake in the options or the configuration, before a process is started.
    """
    pp, others = _pp(options), _parsed(options)
    with CONSOLE.status(literal(f"checking {shown(options.config)}")):
        config, notes = read_config(options.config, overrides)
    most = max(pp or (max(config.distributed.pp_size, 2),))
    launches = not is_worker() and (options.nproc_per_node or most) > 1
    if launches:  # torch and numpy read it on import, here and in the workers
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no compiler workers competing with timed steps
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # a library may ask for GPUs then, see docs/traps.md
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # counting bytes makes the allocator warn of older blocks
    with loading_torch():
        from autofunc.train.benching import BenchWanted, asked_bench, begin_bench, run_bench_rank
        from autofunc.train.worker import run_worker
    wanted = BenchWanted(
        pp=pp, **others, repetitions=options.repetitions, steps=options.steps, seconds=options.seconds,
        checks=not options.no_check, drops=not options.no_dropout,
        output=options.output, as_json=options.as_json,
    )  # fmt: skip
    run = asked_bench(config, notes, wanted, options.config)
    if is_worker():
        run_worker(lambda: run_bench_rank(run))
        return
    with train_command.start_fork_server(False) if launches else nullcontext() as server:
        begin_bench(run, options.nproc_per_node, server)


def _pp(options: BenchOptions) -> tuple[int, ...] | None:
    return _list("--pp", options.pp, lambda word: _number("--pp", word))


def _parsed(options: BenchOptions) -> dict[str, Any]:
    """Parse the other list options; None if not given."""
    return {
        "schedules": _list("--schedules", options.schedules, str),
        "engines": _list("--engines", options.engines, str),
        "compile": _list("--compile", options.compile, lambda word: _one("--compile", word, _COMPILE)),
        "microbatches": _list("--microbatches", options.microbatches, lambda word: _number("--microbatches", word)),
        "remat": _list("--remat", options.remat, lambda word: _one("--remat", word, _REMAT)),
        "against": _list("--against", options.against, str) or (),
        "torch_schedules": _list("--torch-schedules", options.torch_schedules, str) or (),
        "only": _list("--only", options.only, str) or ("*",),
    }


def _list(option: str, text: str | None, read: Callable[[str], T]) -> tuple[T, ...] | None:
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise ConfigError(f"{option} {shown(text)}: expected values separated by commas")
    return tuple(dict.fromkeys(read(word) for word in words))


def _one(option: str, word: str, known: dict[str, T]) -> T:
    if word not in known:
        raise ConfigError(f"{option} {shown(word)}: {one_of(word, known)}")
    return known[word]


def _number(option: str, word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise ConfigError(f"{option} {shown(word)}: expected positive numbers separated by commas")
    return int(word)

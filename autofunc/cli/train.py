"""`autofunc train`, `finetune llm` and `pretrain llm`: the part that runs before torch, which takes seconds to import.

The rest is `train.begin`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

from autofunc.cli.loading import loading_torch
from autofunc.cli.options import RunOptions
from autofunc.config import FinetuneConfig, read_config
from autofunc.progress_bar import CONSOLE
from autofunc.shown import literal, shown
from autofunc.timing import clock
from autofunc.train.fork_server import ForkServer, is_alone
from autofunc.train.role import is_worker
from autofunc.train.texts import TextsWanted

_OF_WORKERS = ["autofunc.train.begin"]
_OF_TRAINING = ["matplotlib.figure", "matplotlib.backends.backend_agg"]
"""Modules that workers need. Matplotlib, which draws the curves at the end, is imported while this process checks the run.
"""


def train(
    verb: Sequence[str],
    options: RunOptions,
    overrides: Sequence[str],
    *,
    evaluates: bool = False,
    as_json: bool = False,
    texts: TextsWanted | None = None,
) -> None:
    """Run a configuration.

    Args:
        verb: the words of the command, such as ["finetune", "llm"].
        options: how to start the run.
        overrides: see `config.load_config`.
        evaluates: measure instead of training.
        as_json: print the measurements as JSON.
        texts: generate these texts instead of training.

    Raises:
        AutofuncError: for every mistake in the configuration, before a process is started.
    """
    words = ["autofunc", *verb, "-c", options.config, *overrides]
    if is_worker():
        _work(options, overrides, words, evaluates=evaluates, as_json=as_json, quiet=options.quiet, texts=texts)
        return
    with _checking(options):
        config, notes = read_config(options.config, overrides)
        clock.done("reading the configuration")
    launches = _launches(config, options)
    if launches:  # torch and numpy read it on import, here and in the workers
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # a library may ask for GPUs then, see docs/traps.md
    with loading_torch():
        from autofunc.train.begin import asked, begin, checked_recipe
    trains = not evaluates and texts is None
    with start_fork_server(trains) if launches else nullcontext() as server:
        run_asked = asked(
            config, notes, words, options.config, overwrite=options.overwrite, max_restarts=options.max_restarts,
            evaluates=evaluates, as_json=as_json, quiet=options.quiet, texts=texts,
        )  # fmt: skip
        with _checking(options):  # reads the data
            recipe = checked_recipe(run_asked.config, options.nproc_per_node, notes)
        begin(recipe, run_asked, server)


@contextmanager
def _checking(options: RunOptions) -> Iterator[None]:
    """Show a spinner on terminals; a quiet run also hides the output of code that the file names."""
    if options.quiet:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    else:
        with CONSOLE.status(literal(f"checking {shown(options.config)}")):
            yield


def _launches(config: FinetuneConfig, options: RunOptions) -> bool:
    """Return whether the run needs more processes than this one, or restarts."""
    wanted = config.distributed
    sizes = (
        wanted.pp_size, wanted.cp_size, wanted.tp_size, wanted.dp_size, wanted.dp_replicate_size, wanted.ep_size,
        options.nproc_per_node,
    )  # fmt: skip
    return bool(options.max_restarts) or any(size not in (None, 1) for size in sizes)


def start_fork_server(trains: bool) -> AbstractContextManager[ForkServer | None]:
    """Start the process that workers are forked from, before this one does anything but import."""
    modules = _OF_WORKERS + (_OF_TRAINING if trains else [])
    return ForkServer.forked(modules) if is_alone() else ForkServer.started(modules)


def _work(options: RunOptions, overrides: Sequence[str], words: Sequence[str], **how: Any) -> None:
    with loading_torch():
        from autofunc.train.begin import asked, run_rank
        from autofunc.train.worker import run_worker

    def work() -> None:
        config, notes = read_config(options.config, overrides)
        run_rank(asked(config, notes, words, options.config, overwrite=options.overwrite, **how))

    run_worker(work)

"""`autofunc finetune llm`: what comes before torch, which takes seconds to import. The rest is `train.begin`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from rich.console import Console

from autofunc.cli.loading import loading_torch
from autofunc.config import FinetuneConfig, read_config
from autofunc.shown import literal, shown
from autofunc.timing import clock
from autofunc.train.fork_server import ForkServer
from autofunc.train.role import is_worker

_OF_WORKERS = [
    "autofunc.train.begin", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.fx.experimental.proxy_tensor",
]  # fmt: skip
"""Modules that all workers need."""


def finetune_llm(
    config_path: str, overrides: Sequence[str], nproc_per_node: int | None, overwrite: bool, max_restarts: int = 0
) -> None:
    """Run a configuration.

    Args:
        config_path: the YAML file.
        overrides: see `config.load_config`.
        nproc_per_node: processes to start; the configuration's own number by default.
        overwrite: whether a run in the same output folder is replaced.
        max_restarts: how often workers are started again after a failure.

    Raises:
        AutofuncError: for every mistake in the configuration, before a process is started.
    """
    if is_worker():
        _work(config_path, overrides, overwrite)
        return
    with _checking(config_path):
        config, notes = read_config(config_path, overrides)
        clock.done("reading the configuration")
    with _fork_server(config, nproc_per_node, max_restarts) as server:
        with loading_torch():
            from autofunc.train.begin import asked, begin, checked_recipe
        words = ["autofunc", "finetune", "llm", "-c", config_path, *overrides]
        run_asked = asked(config, notes, words, config_path, overwrite=overwrite, max_restarts=max_restarts)
        with _checking(config_path):  # reads the data
            recipe = checked_recipe(config, nproc_per_node, notes)
        begin(recipe, run_asked, server)


def _checking(config_path: str) -> AbstractContextManager[object]:
    """Shown on terminals."""
    return Console(stderr=True).status(literal(f"checking {shown(config_path)}"))


def _fork_server(
    config: FinetuneConfig, nproc_per_node: int | None, max_restarts: int
) -> AbstractContextManager[ForkServer | None]:
    """What the workers are forked from, where there will be more than this process, or one that is started again."""
    wanted = config.distributed
    sizes = (max_restarts + 1, wanted.pp_size, wanted.tp_size, wanted.dp_size, wanted.dp_replicate_size, nproc_per_node)
    if all(size in (None, 1) for size in sizes):
        return nullcontext()
    variables = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # a library may ask for GPUs when it is imported, see docs/traps.md
    }
    return ForkServer(_OF_WORKERS, variables)


def _work(config_path: str, overrides: Sequence[str], overwrite: bool) -> None:
    with loading_torch():
        from autofunc.train.begin import asked, run_rank
        from autofunc.train.worker import run_worker

    def work() -> None:
        config, notes = read_config(config_path, overrides)
        words = ["autofunc", "finetune", "llm", "-c", config_path, *overrides]
        run_rank(asked(config, notes, words, config_path, overwrite=overwrite))

    run_worker(work)

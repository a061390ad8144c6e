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
        _work(config_path, overrides, overwrite)
        return
    with _checking(config_path):
        config, notes = read_config(config_path, overrides)
        clock.done("reading the configuration")
    with _fork_server(config, nproc_per_node) as server:
        with loading_torch():
            from autofunc.train.begin import begin, checked_recipe, output_dir_of
        with _checking(config_path):  # reads the data
            recipe = checked_recipe(config, nproc_per_node, notes)
        begin(recipe, config, notes, output_dir_of(config, config_path), overwrite, server)


def _checking(config_path: str) -> AbstractContextManager[object]:
    """Shown on terminals."""
    return Console(stderr=True).status(literal(f"checking {shown(config_path)}"))


def _fork_server(config: FinetuneConfig, nproc_per_node: int | None) -> AbstractContextManager[ForkServer | None]:
    """What the workers are forked from, where there will be more than this process."""
    wanted = config.distributed
    sizes = (wanted.pp_size, wanted.tp_size, wanted.dp_size, wanted.dp_replicate_size, nproc_per_node)
    if all(size in (None, 1) for size in sizes):
        return nullcontext()
    variables = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # a library may ask for GPUs when it is imported, see docs/traps.md
    }
    return ForkServer(_OF_WORKERS, variables)


def _work(config_path: str, overrides: Sequence[str], overwrite: bool) -> None:
    with loading_torch():
        from autofunc.train.begin import output_dir_of, run_rank
        from autofunc.train.worker import run_worker

    def work() -> None:
        config, notes = read_config(config_path, overrides)
        run_rank(config, notes, output_dir_of(config, config_path), overwrite=overwrite)

    run_worker(work)

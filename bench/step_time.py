"""What does a pipelined step cost compared with the plain microbatch loop?

Two answers, each from pairs run one after the other (A B A B ...) and reported as the median of the ratios:

- overhead: a tiny MLP, both ranks in one process, so that nothing but Python is measured;
- speed: the demo's GPT-2 on two gloo processes with one thread each, against the loop on one thread, and against the
  schedule's bound.

Run: make bench
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from demo_gpt2 import MICROBATCHES, demo_gpt2
from rich.console import Console
from rich.progress import track
from rich.table import Table

import autofunc as af
from stages.mlp import build_mlp_model

PAIRS = 9


def seconds(function: Callable[[], Any]) -> float:
    """Return the wall time of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def mean_square(outputs: torch.Tensor, microbatch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the loss of the MLP."""
    return (outputs - microbatch["y"]).square().mean()


def overhead() -> tuple[float, float, float]:
    """Return median step times (loop, pipeline) in ms, and the pipeline's added Python per stage-microbatch in us."""
    microbatches, ranks = 32, 2
    model = build_mlp_model(8, 8, 8, 4)
    params, batch = model.init(), {"x": torch.randn(32, 8), "y": torch.randn(32, 8)}
    s = af.schedule.build("1f1b", num_ranks=ranks, num_microbatches=microbatches)
    step = af.value_and_grad(af.pipeline(af.split(model, ["blocks.2"]), s, loss=mean_square))
    loop = af.reference_value_and_grad(model, mean_square, microbatches)
    step(params, batch)
    pairs = [(seconds(lambda: loop(params, batch)), seconds(lambda: step(params, batch))) for _ in range(PAIRS * 5)]
    added = statistics.median(b - a for a, b in pairs) / (microbatches * ranks)
    return statistics.median(a for a, _ in pairs) * 1e3, statistics.median(b for _, b in pairs) * 1e3, added * 1e6


def speed(rank: int, store: str, results: str) -> None:
    """Run one of two processes; the first writes (loop, pipeline) pairs in seconds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    model, batch = demo_gpt2()
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=MICROBATCHES)
    mesh = af.make_mesh(pp=2, device_type="cpu")
    pipe = af.pipeline(af.split(model, ["h.2"]), s, loss=af.losses.causal_lm, mesh=mesh)
    loop = af.reference_value_and_grad(model, af.losses.causal_lm, MICROBATCHES)
    params, full = pipe.init(), model.init()
    step = af.value_and_grad(pipe)
    step(params, batch)
    pairs = []
    for _ in track(range(PAIRS), description="two processes", disable=rank != 0, transient=True):
        alone = seconds(lambda: loop(full, batch)) if rank == 0 else 0.0
        dist.barrier()  # the other process rests while the loop runs
        pairs.append((alone, seconds(lambda: step(params, batch))))
        dist.barrier()
    if rank == 0:
        torch.save(pairs, results)
    dist.destroy_process_group()


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    console = Console()
    loop_ms, pipe_ms, added_us = overhead()
    with tempfile.TemporaryDirectory() as folder:
        store, results = str(Path(folder, "store")), str(Path(folder, "pairs.pt"))
        torch.multiprocessing.spawn(speed, (store, results), 2)
        pairs = torch.load(results)
    speedup = statistics.median(a / b for a, b in pairs)
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=MICROBATCHES)
    bound = 2 * (1 - af.schedule.simulate(s).bubble_fraction)
    table = Table(title=f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores")
    for column in ("question", "plain loop", "pipeline", "result"):
        table.add_column(column)
    table.add_row("overhead, tiny MLP", f"{loop_ms:.1f} ms", f"{pipe_ms:.1f} ms", f"{added_us:.0f} us a stage-microbatch")
    table.add_row(
        "speed, GPT-2, 2 processes",
        f"{statistics.median(a for a, _ in pairs) * 1e3:.0f} ms",
        f"{statistics.median(b for _, b in pairs) * 1e3:.0f} ms",
        f"{speedup:.2f}x of {bound:.2f}x",
    )
    console.print(table)


if __name__ == "__main__":
    main()

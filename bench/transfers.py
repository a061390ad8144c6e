"""How long does a step take when small messages go over Unix sockets, and over gloo?

The GPT-2 of `against_torch.py`'s small setting, compiled: 8 blocks, d=64, T=32, 32 microbatches of one row, messages of
8 KB; two gloo processes with one thread each. Both ways take turns.

Run: make bench, or python bench/transfers.py
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import statistics
import tempfile
import time

import torch
import torch.distributed as dist
from machine import describe_machine
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch_model import cut, mean_loss_of, random_batch, untied_gpt2

import autofunc as af

RANKS, MICROBATCHES, ROUNDS, STEPS = 2, 32, 15, 5


def measure(rank: int, store: str) -> None:
    """One of two processes; the first prints the table."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    mesh, model, batch = af.make_mesh(RANKS), untied_gpt2(64, 32, 64, 8, 4), random_batch(64, MICROBATCHES, 32)
    table = Table("schedule", "sockets ms", "gloo ms", "gloo / sockets", "least, most", title="a step; medians")
    names = track(af.schedule.names(), "schedules", transient=True, disable=rank > 0)
    for name in names:
        s = af.schedule.build(name, num_ranks=RANKS, num_microbatches=MICROBATCHES)
        pipes = [
            af.pipeline(
                cut(model, s.num_stages), s, loss=mean_loss_of, mesh=mesh, compile=True,
                transfers=af.Transfers(sockets=sockets),
            )
            for sockets in (True, False)
        ]  # fmt: skip
        params = pipes[0].init()
        rows = [[step_ms(pipe, params, batch) for pipe in pipes] for _ in range(ROUNDS + 1)][1:]
        ours, theirs = (statistics.median(column) for column in zip(*rows, strict=True))
        ratios = sorted(b / a for a, b in rows)
        middle = f"{statistics.median(ratios):.2f}"
        table.add_row(name, f"{ours:.1f}", f"{theirs:.1f}", middle, f"{ratios[0]:.2f}, {ratios[-1]:.2f}")
        for pipe in pipes:
            pipe.close()
    if rank == 0:
        Console().print(table)
    dist.barrier()
    dist.destroy_process_group()


def step_ms(pipe: af.Pipeline, params: object, batch: dict[str, torch.Tensor]) -> float:
    """Return the median wall time of a few steps."""
    step, times = af.value_and_grad(pipe), []
    for _ in range(STEPS):
        dist.barrier()
        began = time.perf_counter()
        step(params, batch)
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def main() -> None:
    """Measure and print."""
    Console().print(describe_machine())
    with tempfile.TemporaryDirectory() as scratch:
        torch.multiprocessing.spawn(measure, (f"{scratch}/store",), RANKS)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()

"""How much larger is the measured bubble than the schedule's own, with the costs of the same step?

The large setting of `against_torch.py`, compiled, on two gloo processes with one thread each. A small bubble is a few
actions long, so one that is late shows: every schedule is profiled many times, in turns, and means are compared.

Run: make bench, or python bench/bubble.py --steps 5
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import argparse
import statistics
import tempfile

import torch
import torch.distributed as dist
from against_torch import RANKS, SETTINGS, stages_of
from machine import describe_machine
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch_model import mean_loss_of, random_batch, untied_gpt2

import autofunc as af

SCHEDULES = ("1f1b", "interleaved_1f1b", "zbv")


def measure(rank: int, store: str, steps: int) -> None:
    """One of two processes; the first prints the table."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    setting, mesh = SETTINGS["large"], af.make_mesh(RANKS)
    model = untied_gpt2(setting.vocab, setting.tokens, setting.features, setting.blocks, setting.heads)
    batch = random_batch(setting.vocab, setting.microbatches, setting.tokens)
    pipes = {}
    for name in SCHEDULES:
        s = af.schedule.build(name, num_ranks=RANKS, num_microbatches=setting.microbatches)
        stages = stages_of(model, setting, s.num_stages)
        pipes[name] = af.pipeline(stages, s, loss=mean_loss_of, mesh=mesh, compile=True)
    params = {name: pipe.init() for name, pipe in pipes.items()}
    pairs: dict[str, list[tuple[af.schedule.Timeline, af.schedule.Timeline]]] = {name: [] for name in SCHEDULES}
    for _ in track(range(steps), "steps", transient=True, disable=rank > 0):
        for name, pipe in pipes.items():
            found = pipe.profile(params[name], batch, steps=1)
            own = af.schedule.simulate(found.schedule, af.schedule.costs_of(found), found.edges)
            pairs[name].append((found, own))
    if rank == 0:
        Console().print(describe_machine())
        title = f"bubbles of {steps} steps"
        table = Table("schedule", "measured", "schedule's", "ratio", "of one step", "makespans", title=title)
        for name in SCHEDULES:
            columns = zip(*pairs[name], strict=True)
            measured, own_ones = (statistics.mean(each.bubble_fraction for each in column) for column in columns)
            each = sorted(a.bubble_fraction / b.bubble_fraction for a, b in pairs[name])
            times = sorted(a.makespan / b.makespan for a, b in pairs[name])
            table.add_row(
                name, f"{measured:.1%}", f"{own_ones:.1%}", f"{measured / own_ones:.3f}",
                f"{each[0]:.2f} to {each[-1]:.2f}", f"{statistics.median(times):.3f} (most {times[-1]:.3f})",
            )  # fmt: skip
        Console().print(table)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=15)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        torch.multiprocessing.spawn(measure, (f"{scratch}/store", given.steps), RANKS)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()

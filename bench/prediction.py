"""How well is a step's time predicted from costs measured in a run of another schedule?

GPT-2 on two gloo processes with one thread each. In every round each pipeline runs a profiled step, one after the other, so
that all see the same state of the machine; the first of each family also runs with every backward split, and its medians
over rounds are the costs, which include what a rank does between computations. Each schedule's step is predicted from them
under the measured timing noise (`schedule.expected_makespan`), and compared with the median of its own steps.

Run: make bench, or python bench/prediction.py --repetitions 1
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import pickle
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from demo_gpt2 import MICROBATCHES, demo_gpt2
from machine import describe_machine
from rich.console import Console
from rich.progress import track
from rich.table import Table

import autofunc as af

FAMILIES = {
    1: ("1f1b", "eager_1f1b", "gpipe", "zb_h1", "zb_h2"),
    2: ("interleaved_1f1b", "looped_bfs", "interleaved_zb", "zbv", "v_half", "v_min", "dualpipe_v"),
}

Found = list[tuple[int, str, float, float]]
"""(repetition, schedule, predicted ms, measured ms)."""


def middle(costs: Sequence[af.schedule.Costs]) -> af.schedule.Costs:
    """Return the median of every figure."""
    f, i, w = (np.median([getattr(each, kind) for each in costs], axis=0).tolist() for kind in "FIW")
    single = ("comm", "send", "receive", "between", "spread")
    return af.schedule.Costs(
        f, i, w, **{name: float(np.median([getattr(each, name) for each in costs])) for name in single}
    )


def one_process(rank: int, store: str, results: str, repetitions: int, rounds: int, compiled: bool) -> None:
    """Measure; the first process writes the results."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    mesh = af.make_mesh(pp=2, device_type="cpu")
    model, batch = demo_gpt2()
    found: Found = []
    for stages_per_rank, names in FAMILIES.items():
        stages = af.split(model, 2 * stages_per_rank)
        pipes: dict[str, Any] = {}
        for name in names:
            s = af.schedule.build(name, num_ranks=2, num_microbatches=MICROBATCHES)
            pipes[name] = af.pipeline(stages, s, loss=af.losses.causal_lm, mesh=mesh, compile=compiled)
        params = {name: pipe.init() for name, pipe in pipes.items()}
        for pipe, name in zip(pipes.values(), names, strict=True):
            pipe.profile(params[name], batch, steps=1)
        for repetition in track(range(repetitions), f"{names[0]} ...", disable=rank != 0, transient=True):
            costs: list[af.schedule.Costs] = []
            steps: dict[str, list[af.schedule.Timeline]] = {name: [] for name in names}
            for _ in range(rounds):
                costs.append(pipes[names[0]].costs(params[names[0]], batch, steps=1))
                for name, pipe in pipes.items():
                    steps[name].append(pipe.profile(params[name], batch, steps=1))
            for name, timelines in steps.items():
                predicted = af.schedule.expected_makespan(timelines[0].schedule, middle(costs), timelines[0].edges)
                measured = statistics.median(timeline.makespan for timeline in timelines)
                found.append((repetition, name, predicted, measured))
    if rank == 0:
        Path(results).write_bytes(pickle.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    """Run and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repetitions", type=int, default=3)
    options.add_argument("--rounds", type=int, default=9, help="of each repetition, whose medians count")
    options.add_argument("--compile", action="store_true")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store, results = str(Path(folder, "store")), str(Path(folder, "found.pkl"))
        torch.multiprocessing.spawn(one_process, (store, results, given.repetitions, given.rounds, given.compile), 2)
        found: Found = pickle.loads(Path(results).read_bytes())
    console = Console()
    console.print(describe_machine())
    table = Table("schedule", *(f"{1 + r}" for r in range(given.repetitions)), "errors", "within 3 %", "within 5 %")
    table.title = "predicted / measured ms in each repetition"
    for names in FAMILIES.values():
        for name in names:
            pairs = [(predicted, measured) for _, which, predicted, measured in found if which == name]
            errors = [predicted / measured - 1 for predicted, measured in pairs]
            cells = [f"{predicted:.0f} / {measured:.0f}" for predicted, measured in pairs]
            near = (f"{sum(abs(each) <= bound for each in errors)} of {len(errors)}" for bound in (0.03, 0.05))
            table.add_row(name, *cells, " ".join(f"{each:+.1%}" for each in errors), *near)
    console.print(table)
    for r in range(given.repetitions):
        errors = [abs(predicted / measured - 1) for repetition, _, predicted, measured in found if repetition == r]
        console.print(f"repetition {1 + r}: median error of {len(errors)} schedules {statistics.median(errors):.1%}")


if __name__ == "__main__":
    main()

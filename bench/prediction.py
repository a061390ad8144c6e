"""How well is a step's time predicted from costs measured in a run of another schedule?

GPT-2 on two gloo processes with one thread each. Costs are measured in runs of the first schedule of each list, right
before each run of another, because machines drift; that one is simulated with them and then run.

Run: make bench, or python bench/prediction.py --repetitions 1
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import pickle
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

import autofunc as af
from stages.gpt2 import build_gpt2_model

FAMILIES = {
    1: ("1f1b", "gpipe", "zb_h1", "zb_h2"),
    2: ("interleaved_1f1b", "looped_bfs", "interleaved_zb", "zbv", "v_half"),
}
MICROBATCHES, STEPS = 8, 3


def one_process(rank: int, store: str, results: str, repetitions: int) -> None:
    """Measure; the first process writes (repetition, schedule, predicted ms, measured ms)."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    mesh = af.make_mesh(pp=2, device_type="cpu")
    model = build_gpt2_model(vocab_size=256, n_positions=128, n_embd=192, n_layer=4, n_head=6)
    ids = torch.randint(0, 256, (4 * MICROBATCHES, 129), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    found: list[tuple[int, str, float, float]] = []
    for stages_per_rank, names in FAMILIES.items():
        stages = af.split(model, 2 * stages_per_rank)
        pipes: dict[str, Any] = {}
        for name in names:
            s = af.schedule.build(name, num_ranks=2, num_microbatches=MICROBATCHES)
            pipes[name] = af.pipeline(stages, s, loss=af.losses.causal_lm, mesh=mesh)
        params = {name: pipe.init() for name, pipe in pipes.items()}
        for repetition in range(repetitions):
            for name, pipe in pipes.items():
                costs = pipes[names[0]].costs(params[names[0]], batch, steps=STEPS)
                measured = pipe.profile(params[name], batch, steps=STEPS)
                predicted = af.schedule.simulate(measured.schedule, costs, measured.edges)
                found.append((repetition, name, predicted.makespan, measured.makespan))
    if rank == 0:
        Path(results).write_bytes(pickle.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    """Run and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repetitions", type=int, default=3)
    repetitions = options.parse_args().repetitions
    with tempfile.TemporaryDirectory() as folder:
        store, results = str(Path(folder, "store")), str(Path(folder, "found.pkl"))
        torch.multiprocessing.spawn(one_process, (store, results, repetitions), 2)
        found = pickle.loads(Path(results).read_bytes())
    table = Table(
        "schedule", "costs from", *(f"predicted / measured ms, {1 + r}" for r in range(repetitions)), "median error"
    )
    for names in FAMILIES.values():
        for name in names:
            pairs = [(predicted, measured) for _, which, predicted, measured in found if which == name]
            errors = [predicted / measured - 1 for predicted, measured in pairs]
            cells = [f"{predicted:.0f} / {measured:.0f}" for predicted, measured in pairs]
            table.add_row(name, names[0], *cells, f"{statistics.median(errors):+.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()

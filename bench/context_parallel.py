"""How much smaller are a rank's activations when tokens are cut over two ranks, and what does a step cost?

A Llama with four blocks, one row, all in one stage on gloo processes of one thread each: without a mesh, and with cp=2 by
both methods. The peak is measured after each action of a step (residuals, and gradient sums, which do not depend on
tokens); beside it the bytes that the graph keeps. Times are medians of steps that alternate (A B C A B C ...).

Run: python bench/context_parallel.py [tokens ...]
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from machine import describe_machine
from rich.console import Console
from rich.table import Table

import autofunc as af
from stages.llama import build_llama_model

REPETITIONS = 5
SIZES = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 512}
TOKENS = (2048,)


def measure(rank: int, store: str, results: str, tokens: list[int]) -> None:
    """Run one of two processes; the first writes the results."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    mesh = af.make_mesh(cp=2, device_type="cpu")
    found = []
    for length in tokens:
        s = af.schedule.build("1f1b", num_ranks=1, num_microbatches=1)
        ids = torch.randint(0, SIZES["vocab_size"], (1, length + 1), generator=torch.Generator().manual_seed(0))
        batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
        steps: dict[str, Any] = {}
        kept: dict[str, tuple[int, int]] = {}
        for name, on, remat, method in (
            ("one", None, None, "ring"), ("allgather", mesh, None, "allgather"), ("ring", mesh, None, "ring"),
            ("one, remat", None, "layer", "ring"), ("ring, remat", mesh, "layer", "ring"),
        ):  # fmt: skip
            sharding = af.Sharding(context_parallel=method)
            stages = af.split(build_llama_model(**SIZES))
            pipe = af.pipeline(stages, s, loss=af.losses.causal_lm, mesh=on, remat=remat, sharding=sharding)
            params = pipe.init(0)
            kept[name] = max(pipe.measure_bytes(params, batch)[0]), pipe.memory(params, batch)[0].residuals
            steps[name] = partial(af.value_and_grad(pipe), params, batch)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(REPETITIONS):
            for name, step in steps.items():
                dist.barrier()
                start = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - start)
        found.append((length, kept, {name: statistics.median(each) for name, each in times.items()}))
    if rank == 0:
        torch.save(found, results)
    dist.destroy_process_group()


def main() -> None:
    """Measure and print."""
    tokens = [int(word) for word in sys.argv[1:]] or list(TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        arguments = (str(Path(folder) / "store"), str(results), tokens)
        torch.multiprocessing.spawn(measure, arguments, nprocs=2)
        found = torch.load(results)
    console = Console()
    console.print(describe_machine(), highlight=False)
    table = Table("tokens", "", box=None, pad_edge=False)
    for title in ("weighed peak, MiB", "ratio", "kept, MiB", "ratio", "median step, s"):
        table.add_column(title, justify="right")
    for length, kept, times in found:
        for name, both in kept.items():
            whole = kept["one, remat" if "remat" in name else "one"]
            cells = [cell for each, all_ in zip(both, whole, strict=True) for cell in (each / 2**20, each / all_)]
            table.add_row(str(length), name, *(f"{cell:.3f}" for cell in cells), f"{times[name]:.2f}")
    console.print(table, highlight=False)


if __name__ == "__main__":
    main()

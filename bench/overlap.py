"""How much of the exchange between ranks that share experts is hidden if a forward and a backward overlap?

A small MoE model, `dualpipe_v`, pp=2 and two ranks that share experts: four gloo processes of one thread each. Every
exchange between these is delayed by the given milliseconds, as on a slow network. Steps with and without overlap alternate
(A B A B ...); reported are medians. Both timelines are drawn.

Run: python bench/overlap.py [milliseconds ...] [--draw FILE]
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from machine import describe_machine
from rich.console import Console
from rich.table import Table
from torch import Tensor

import autofunc as af
from autofunc.mesh import data_coordinate
from autofunc.shard.expert_exchange import GroupPeers
from stages.moe import build_moe_model, moe_causal_lm

REPETITIONS = 7
MICROBATCHES = 8
DELAYS = (0.0, 5.0, 10.0, 20.0)
SIZES = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4,
    "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
TOKENS = 128
METHODS = ("all_gather", "all_reduce", "all_to_all")


class Slow:
    """Delays exchanges: a result arrives no earlier than this many seconds after its exchange began."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for name in METHODS:
            setattr(GroupPeers, name, self._slow(getattr(GroupPeers, name)))

    def _slow(self, begin: Callable[..., Callable[[], Tensor]]) -> Callable[..., Callable[[], Tensor]]:
        def slow(peers: GroupPeers, *given: Any) -> Callable[[], Tensor]:
            wait, there = begin(peers, *given), time.perf_counter() + self.seconds

            def late() -> Tensor:
                found = wait()
                time.sleep(max(there - time.perf_counter(), 0.0))
                return found

            return late

        return slow


def measure(rank: int, store: str, results: str, delays: list[float]) -> None:
    """Run one of four processes; the first writes the results."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 4), rank=rank, world_size=4)
    slow, mesh = Slow(), af.make_mesh(pp=2, dp_shard=2, device_type="cpu")
    model = build_moe_model(**SIZES, num_hidden_layers=4)
    stages = af.split(model, ["layers.1", "layers.2", "layers.3"])
    s = af.schedule.build("dualpipe_v", num_ranks=2, num_microbatches=MICROBATCHES)
    ids = torch.randint(0, 512, (2 * MICROBATCHES, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    ids = ids.chunk(2)[data_coordinate(mesh)[0]]
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    sharding = af.Sharding(expert_parallel=2)

    def loss(outputs: Any, microbatch: Any) -> Any:
        return moe_causal_lm(outputs, microbatch)

    pipes = {
        overlap: af.pipeline(stages, s, loss=loss, mesh=mesh, sharding=sharding, overlap_f_b=overlap)
        for overlap in (False, True)
    }
    params = pipes[True].init(0)
    found = []
    for delay in delays:
        slow.seconds, made = delay / 1e3, {}
        times: dict[bool, list[float]] = {False: [], True: []}
        for overlap, pipe in pipes.items():
            made[overlap] = af.value_and_grad(pipe)(params, batch)[0]
        assert torch.equal(made[False], made[True]), "the same bits"
        for _ in range(REPETITIONS):
            for overlap, pipe in pipes.items():
                dist.barrier()
                start = time.perf_counter()
                af.value_and_grad(pipe)(params, batch)
                times[overlap].append(time.perf_counter() - start)
        timelines = {overlap: pipe.profile(params, batch) for overlap, pipe in pipes.items()}
        found.append((delay, times, timelines))
    if rank == 0:
        torch.save(found, results)
    dist.destroy_process_group()


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser()
    parser.add_argument("delays", nargs="*", type=float, default=list(DELAYS))
    parser.add_argument("--draw", help="a file for the timelines of the last delay: .html, .svg, .png or .json")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        torch.multiprocessing.spawn(measure, (str(Path(folder) / "store"), str(results), wanted.delays), nprocs=4)
        found = torch.load(results, weights_only=False)
    console = Console()
    console.print(f"{describe_machine()}, load {os.getloadavg()[0]:.1f}", highlight=False)
    table = Table("delay, ms", "one after the other, ms", "side by side, ms", "ratio of pairs", box=None, pad_edge=False)
    for delay, times, _ in found:
        ratio = statistics.median(b / a for a, b in zip(times[False], times[True], strict=True))
        plain, beside = (statistics.median(times[overlap]) * 1e3 for overlap in (False, True))
        table.add_row(f"{delay:g}", f"{plain:.0f}", f"{beside:.0f}", f"{ratio:.2f}")
    console.print(table, highlight=False)
    if wanted.draw:
        af.schedule.draw([found[-1][2][overlap] for overlap in (False, True)], wanted.draw)


if __name__ == "__main__":
    main()

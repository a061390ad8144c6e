"""What do balanced stages gain if the head is large? GPT-2 with its 50,257 words on two processes.

Equal numbers of layers against stages balanced by counted operations (`split_points: auto`) and by measured layers
(`autofunc plan --measure`), stepping in turns in the same two processes; the model is transformers' own, captured.
Reported: the medians of the ratios.

Run: python bench/auto_split.py [--layers 6 --width 768 --tokens 256 --rounds 5]
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from machine import describe_machine
from rich.progress import track

import autofunc as af
from autofunc.splitting import Stage, imbalance, layer_costs, measure_layers

MICROBATCHES = 8


def build(options: argparse.Namespace) -> tuple[af.Model, dict[str, torch.Tensor]]:
    """transformers' GPT-2, captured without weights, and a batch."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=options.layers, n_embd=options.width, n_head=12, n_positions=options.tokens)
    with af.empty_weights():
        module = GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, config.vocab_size, (MICROBATCHES, options.tokens), generator=torch.Generator().manual_seed(0))
    return af.from_module(module, {"input_ids": ids[:1], "labels": ids[:1]}), {"input_ids": ids, "labels": ids}


def halves(model: af.Model) -> list[Stage]:
    """Cut into two stages with equal numbers of layers."""
    names = list(model.layers)
    return af.split(model, [names[len(names) // 2]])


def measure(rank: int, store: str, results: str, options: argparse.Namespace, starts: dict[str, str]) -> None:
    """Run one of two processes; the first writes seconds, a row per round."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    model, batch = build(options)
    mesh = af.make_mesh(pp=2, device_type="cpu")
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=MICROBATCHES)
    steps: list[Any] = []
    for start in starts.values():
        pipe = af.pipeline(af.split(model, [start]), s, mesh=mesh)
        steps.append((af.value_and_grad(pipe), pipe.init(seed=0)))
        steps[-1][0](steps[-1][1], batch)
    rounds = []
    for _ in track(range(options.rounds), description="rounds", disable=rank != 0, transient=True):
        seconds = []
        for step, params in steps:
            dist.barrier()
            began = time.perf_counter()
            step(params, batch)
            seconds.append(time.perf_counter() - began)
        rounds.append(seconds)
    if rank == 0:
        torch.save(rounds, results)
    dist.destroy_process_group()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 6), ("width", 768), ("tokens", 256), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, batch = build(options)
    one = {name: leaf[:1] for name, leaf in batch.items()}
    counted = layer_costs(model, one)
    timed = {name: sum(times) for name, times in measure_layers(model, model.init(), one, None, repeats=3).items()}
    starts = {}
    for title, stages in (
        ("equal numbers", halves(model)),
        ("counted", af.split(model, 2, costs=counted)),
        ("measured", af.split(model, 2, costs=timed)),
    ):
        starts[title] = stages[1].layers[0]
        print(f"{title}: second stage from {starts[title]}, longest {imbalance(stages, timed):.2f}x the mean")
    with tempfile.TemporaryDirectory() as folder:
        results = str(Path(folder, "rounds.pt"))
        torch.multiprocessing.spawn(measure, (str(Path(folder, "store")), results, options, starts), 2)
        rounds = torch.load(results)
    print(describe_machine())
    for number, title in enumerate(starts):
        seconds = statistics.median(row[number] for row in rounds)
        gain = statistics.median(row[0] / row[number] for row in rounds)
        print(f"{title}: {seconds:.2f} s a step, {gain:.2f}x equal numbers (median of {len(rounds)} rounds)")


if __name__ == "__main__":
    main()

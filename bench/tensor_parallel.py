"""What does tensor parallelism cost per step: captured once, or decided operator by operator?

A GPT-2 on two gloo processes, one thread each, tp=2, all in one stage: the graph engine (and compiled pieces) against eager
DTensor. Steps alternate (A B C A B C ...); reported are medians of ratios, and the same model on one
process.

Run: python bench/tensor_parallel.py
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from machine import describe_machine
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module

import autofunc as af
from stages.gpt2 import build_gpt2_model

REPETITIONS = 15
MICROBATCHES = 4
SIZES = [(256, 32, 4, 2), (256, 128, 4, 2), (512, 128, 8, 2)]  # features, tokens, heads, blocks
VOCABULARY = 512


class Block(nn.Module):
    """A block as people write it for torch's own tensor parallelism."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.width, self.head_width = width, width // heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.fc, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return this rank's heads."""
        h = self.ln_1(x)
        q, k, v = (part(h).unflatten(-1, (-1, self.head_width)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).flatten(-2))
        return x + self.out(nn.functional.gelu(self.fc(self.ln_2(x)), approximate="tanh"))


class Torch(nn.Module):
    """torch's own way: modules whose inputs and outputs are local tensors, parameters DTensors."""

    def __init__(self, width: int, heads: int, blocks: int, tokens: int, mesh: DeviceMesh) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, width), nn.Parameter(torch.zeros(tokens, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.ln_f, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        from torch.distributed.tensor import Replicate, Shard

        for block in self.blocks:
            parts = dict.fromkeys(("q", "k", "v", "fc"), ColwiseParallel())
            parallelize_module(block, mesh, parts | {"proj": RowwiseParallel(), "out": RowwiseParallel()})
        head = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
        parallelize_module(self, mesh, {"wte": RowwiseParallel(input_layouts=Replicate()), "head": head})

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits, cut along the vocabulary."""
        x = self.wte(ids) + self.wpe
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x))


def measure(rank: int, store: str, results: str) -> None:
    """Run one of two processes; the first writes the times."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    mesh = af.make_mesh(tp=2, device_type="cpu")
    found = []
    for width, tokens, heads, blocks in SIZES:
        model = build_gpt2_model(VOCABULARY, tokens, width, blocks, heads)
        s = af.schedule.build("1f1b", num_ranks=1, num_microbatches=MICROBATCHES)
        ids = torch.randint(0, VOCABULARY, (MICROBATCHES, tokens + 1), generator=torch.Generator().manual_seed(0))
        batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
        steps: dict[str, Any] = {}
        for name, options in (
            ("graph", {}),
            ("compiled", {"compile": True}),
            ("eager", {"engine": "eager"}),
            ("one process", {"mesh": None}),
        ):
            pipe = af.pipeline(af.split(model), s, loss=af.losses.causal_lm, **{"mesh": mesh, **options})
            params = pipe.init()
            steps[name] = partial(af.value_and_grad(pipe), params, batch)
        module = Torch(width, heads, blocks, tokens, mesh["tp"])

        def torch_step(module: Torch = module, batch: dict[str, Tensor] = batch) -> None:
            module.zero_grad(set_to_none=True)
            rows = zip(batch["input_ids"].chunk(MICROBATCHES), batch["labels"].chunk(MICROBATCHES), strict=True)
            with loss_parallel():
                for inputs, labels in rows:
                    logits = module(inputs)
                    nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()

        steps["torch"] = torch_step
        times: dict[str, list[float]] = {name: [] for name in steps}
        for repetition in track(range(REPETITIONS + 2), f"d={width} T={tokens}", disable=rank != 0, transient=True):
            for name, step in steps.items():
                dist.barrier()
                began = time.perf_counter()
                if name != "one process" or rank == 0:
                    step()
                if repetition >= 2:
                    times[name].append(time.perf_counter() - began)
        found.append(times)
    if rank == 0:
        torch.save(found, results)
    dist.destroy_process_group()


def main() -> None:
    """Measure and print."""
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        store, results = str(Path(folder, "store")), str(Path(folder, "times.pt"))
        torch.multiprocessing.spawn(measure, (store, results), 2)
        found = torch.load(results)
    console.print(describe_machine(), highlight=False)
    table = Table(title=f"ms a step of {MICROBATCHES} microbatches of one row, tp=2; x: over the graph engine, medians")
    for column in ("d", "T", "graph", "compiled", "eager DTensor", "torch's modules", "one process"):
        table.add_column(column, justify="right")
    for (width, tokens, _, _), times in zip(SIZES, found, strict=True):

        def cell(name: str, times: dict[str, list[float]] = times) -> str:
            ratio = statistics.median(a / b for a, b in zip(times[name], times["graph"], strict=True))
            return f"{statistics.median(times[name]) * 1e3:.1f}" + ("" if name == "graph" else f" ({ratio:.2f}x)")

        table.add_row(
            str(width), str(tokens), *(cell(name) for name in ("graph", "compiled", "eager", "torch", "one process"))
        )
    console.print(table)


if __name__ == "__main__":
    main()

"""What do a stage's four pieces cost, in each engine, and what does splitting the backward add?

Two blocks as a middle stage, one thread, engines in turn (A B C A B C ...), medians. The ratio (I + W) / B is taken per
call. Torch's own split is measured beside them: `stage_backward_input` and `stage_backward_weight` of
`torch.distributed.pipelining`, on the same function and weights.

With `--device cuda` the blocks are larger and of bf16, and a piece is timed until the device has finished it.

Run: make bench, or python bench/engine_pieces.py
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from blocks import middle_stage
from machine import describe_machine
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from autofunc.engine import EagerStage, GraphStage, Microbatch, capture
from autofunc.engine.graph import COMPUTATIONS
from autofunc.runtime.accumulate import Accumulator
from autofunc.splitting import StageContext, infer

SIZES = {  # features, tokens, heads, repetitions
    "cpu": ((32, 8, 4, 200), (64, 32, 4, 100), (768, 128, 12, 15)),
    "cuda": ((1024, 1024, 16, 30), (2048, 2048, 16, 30)),
}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
WARMUP = 3


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """(result, microseconds)."""
    synchronize = torch.accelerator.synchronize if torch.accelerator.is_available() else lambda: None
    synchronize()
    began = time.perf_counter()
    result = call()
    synchronize()
    return result, (time.perf_counter() - began) * 1e6


def _random(context: StageContext) -> Tensor:
    """Return tensors as large as the stage's inputs and outputs."""
    value = infer(context).boundary.values[0]
    return torch.randn(value.shape, dtype=value.dtype, device=context.device)


def pieces(engine: Any, context: StageContext, leaves: list[Tensor], sums: Accumulator) -> tuple[float, ...]:
    """Time F, B, I and W once each, in microseconds."""
    x, cotangent = (_random(context) for _ in range(2))  # blocks keep the shape
    bound, microbatch = engine.bind(leaves), Microbatch.of(context.microbatch)
    with torch.no_grad():
        (_, residuals), f = timed(lambda: engine.forward(bound, [], [x], microbatch))
        _, b = timed(lambda: engine.backward(residuals, [cotangent], sums))
        _, again = engine.forward(bound, [], [x], microbatch)
        (_, kept), i = timed(lambda: engine.backward_input(again, [cotangent], sums))
        _, w = timed(lambda: engine.backward_weight(kept, sums))
    return f, b, i, w


def torch_pieces(context: StageContext, leaves: list[Tensor]) -> tuple[float, ...]:
    """Time torch's pieces, which accumulate into `.grad`."""
    from torch.distributed.pipelining._backward import stage_backward, stage_backward_input, stage_backward_weight

    cotangent = _random(context)
    bound = context.stage.bind(leaves)

    def forward() -> tuple[Tensor, Tensor]:
        x = torch.randn_like(cotangent).requires_grad_()
        return x, context.run(bound, [x], context.microbatch, [])[0]

    (x, out), f = timed(forward)
    _, b = timed(lambda: stage_backward((out,), (cotangent,), [x]))
    x, out = forward()
    (_, groups), i = timed(lambda: stage_backward_input((out,), (cotangent,), [x], iter(leaves)))
    _, w = timed(lambda: stage_backward_weight(iter(leaves), groups))
    return f, b, i, w


def main() -> None:
    """Print a table per family of blocks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=SIZES)
    device = parser.parse_args().device
    torch.set_num_threads(1)
    console = Console()
    console.print(describe_machine())
    for family in ("gpt2", "llama"):
        table = Table("d", "T", "engine", "F us", "B us", "I us", "W us", "(I + W) / B", title=f"two blocks of {family}")
        for features, tokens, heads, repetitions in SIZES[device]:
            context, params = middle_stage(family, features, tokens, heads, device, DTYPES[device])
            leaves, joint = context.stage.leaves(params), capture(context)
            own = [leaf.detach().clone().requires_grad_() for leaf in leaves]
            made: dict[str, Any] = {
                "eager": EagerStage(context, joint.returned.boundary),
                "graph": GraphStage(joint, context),
                "compiled": GraphStage(joint, context, compiled=True),
            }
            for name in ("graph", "compiled"):
                made[name].make(COMPUTATIONS)
            sums = {name: Accumulator(context.accumulator_layouts, context.device) for name in made}
            found: dict[str, list[tuple[float, ...]]] = {"torch": [], **{name: [] for name in made}}
            for repetition in track(range(repetitions + WARMUP), f"{family}, d={features}", transient=True):
                measured = {"torch": torch_pieces(context, own)}
                measured |= {name: pieces(engine, context, leaves, sums[name]) for name, engine in made.items()}
                if repetition >= WARMUP:
                    for name, row in measured.items():
                        found[name].append(row)
            for name, rows in found.items():
                medians = [f"{statistics.median(column):.0f}" for column in zip(*rows, strict=True)]
                ratio = statistics.median((i + w) / b for _, b, i, w in rows)
                table.add_row(str(features), str(tokens), name, *medians, f"{ratio:.3f}")
        console.print(table)


if __name__ == "__main__":
    main()

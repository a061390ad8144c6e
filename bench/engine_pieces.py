"""What do a stage's four pieces cost, in each engine, and what does splitting the backward add?

Two GPT-2 blocks as a middle stage, one thread, engines in turn (A B A B ...), medians. The ratio (I + W) / B is taken call
by call. Bytes are counted by storage: a view of what is kept costs nothing more.

Run: make bench, or python bench/engine_pieces.py
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import autofunc as af
from autofunc.engine import EagerStage, GraphStage, Microbatch, StageContext
from autofunc.engine.capture import base_of
from autofunc.runtime.accumulate import Accumulator
from autofunc.splitting import infer_boundaries, parameter_dtypes
from autofunc.tree import flatten
from stages.gpt2 import build_gpt2_model

SIZES = ((32, 8, 4, 200), (64, 32, 4, 100), (768, 128, 12, 15))  # features, positions, heads, repetitions


def middle_stage(features: int, positions: int, heads: int) -> tuple[StageContext, dict[str, torch.Tensor]]:
    """Two blocks with a stage before and one after."""
    model = build_gpt2_model(vocab_size=64, n_positions=positions, n_embd=features, n_layer=4, n_head=heads)
    stages = af.split(model, ["h.1", "h.3"])
    params = flatten(model.init())
    ids = torch.randint(0, 64, (1, positions))
    microbatch = {"input_ids": ids, "labels": ids}
    boundaries = infer_boundaries(stages, params, microbatch, af.losses.causal_lm)
    before, own = boundaries.stages[:2]
    dtypes = parameter_dtypes(model, params)
    context = StageContext(stages[1], before, own, None, False, True, dtypes, microbatch, torch.device("cpu"))
    return context, params


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """(result, microseconds)."""
    began = time.perf_counter()
    result = call()
    return result, (time.perf_counter() - began) * 1e6


def pieces(engine: Any, context: StageContext, params: dict[str, torch.Tensor]) -> tuple[float, float, float, float]:
    """Microseconds of F, B, I, W, once each."""
    assert context.received is not None
    shape = context.received.values[0].shape
    x, cotangent = torch.randn(shape), torch.randn(shape)
    bound = engine.bind(context.stage.leaves(params))
    sums = Accumulator(context.stage.leaves(params))
    microbatch = Microbatch.of(context.microbatch)
    assert sums.sums, "made before anything is timed"
    with torch.no_grad():
        (_, residuals), f = timed(lambda: engine.forward(bound, [x], microbatch))
        _, b = timed(lambda: engine.backward(residuals, [cotangent], sums))
        _, again = engine.forward(bound, [x], microbatch)
        (_, kept), i = timed(lambda: engine.backward_input(again, [cotangent], sums))
        _, w = timed(lambda: engine.backward_weight(kept, sums))
    return f, b, i, w


def storage_bytes(nodes: list[Any]) -> int:
    """Bytes of distinct storages."""
    return sum(
        value.numel() * value.element_size() for value in {base_of(node): node.meta["val"] for node in nodes}.values()
    )


def main() -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    times = Table("d", "T", "engine", "F us", "B us", "I us", "W us", "(I + W) / B")
    memory = Table("d", "T", "MB after F", "MB after I", "ratio")
    for features, positions, heads, repetitions in SIZES:
        context, params = middle_stage(features, positions, heads)
        engines = {"eager": EagerStage(context), "graph": GraphStage(context)}
        found: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in engines}
        for repetition in range(repetitions + 3):
            for name, engine in engines.items():
                measured = pieces(engine, context, params)
                if repetition >= 3:
                    found[name].append(measured)
        for name, rows in found.items():
            medians = [f"{statistics.median(column):.0f}" for column in zip(*rows, strict=True)]
            ratio = statistics.median((i + w) / b for _, b, i, w in rows)
            times.add_row(str(features), str(positions), name, *medians, f"{ratio:.3f}")
        graph = engines["graph"]
        assert isinstance(graph, GraphStage)
        after_f, after_i = storage_bytes(graph.pieces.saved), storage_bytes(graph.pieces.kept)
        sizes = (f"{after_f / 1e6:.3f}", f"{after_i / 1e6:.3f}", f"{after_i / after_f:.2f}")
        memory.add_row(str(features), str(positions), *sizes)
    console = Console()
    console.print(f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores, one thread")
    console.print(times)
    console.print(memory)


if __name__ == "__main__":
    main()

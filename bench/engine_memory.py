"""What does a microbatch hold after F and after I, how often does it run forward, and what do the choices cost?

Two blocks as a middle stage. Bytes are counted from real tensors: the distinct storages of the values handed to the next
piece, without parameters. Forwards are counted by the calls of each block's activation function.

`keep` is what `remat` and a memory budget choose between: what the backward recomputes ("cheap", "layer", "stage"), and the
part of W's work that is done in I. Torch's figures are of `torch.distributed.pipelining` on the same function: the values
its autograd graph saved and, after I, the values it still holds plus the gradients kept for W.

Run: make bench, or python bench/engine_memory.py
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import gc
import statistics
import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from blocks import BLOCKS, middle_stage
from engine_pieces import timed
from machine import describe_machine
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from autofunc.engine import GraphStage, Keep, Microbatch, capture
from autofunc.engine.graph import COMPUTATIONS
from autofunc.runtime.accumulate import Accumulator
from autofunc.splitting import StageContext, infer

FEATURES, TOKENS, HEADS, REPETITIONS = 768, 128, 12, 7
KEEPS = (
    Keep(), Keep(None, 0.25), Keep(None, 0.5), Keep("cheap"), Keep("cheap", 0.5), Keep("layer"), Keep("layer", 0.5),
    Keep("layer", 1.0), Keep("stage"),
)  # fmt: skip
ACTIVATIONS = {"gpt2": torch.ops.aten.gelu.default, "llama": torch.ops.aten.silu.default}


class Counter(TorchDispatchMode):
    """Counts the calls of one operator."""

    def __init__(self, target: Any) -> None:
        super().__init__()
        self.target, self.calls = target, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Forward the call."""
        self.calls += func is self.target
        return func(*args, **(kwargs or {}))


def storage_bytes(tensors: Iterable[Tensor], without: Iterable[Tensor]) -> int:
    """Return the bytes of distinct storages."""
    excluded = {tensor.untyped_storage().data_ptr() for tensor in without}
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(size for place, size in sizes.items() if place not in excluded)


def ours(
    family: str, joint: Any, context: StageContext, leaves: list[Tensor], keep: Keep
) -> tuple[int, int, float, list[float]]:
    """(bytes after F, bytes after I, forwards, [I us, W us])."""
    stage, microbatch = GraphStage(joint, context, keep), Microbatch.of(context.microbatch)
    stage.make(COMPUTATIONS)
    sums = Accumulator(context.accumulator_layouts, context.device)
    excluded = [*leaves, *microbatch.tensors]
    times = []
    with torch.no_grad():
        counter = Counter(ACTIVATIONS[family])
        for repetition in range(REPETITIONS):
            x, cotangent = (torch.randn(infer(context).boundary.values[0].shape) for _ in range(2))  # blocks keep the shape
            with counter if repetition == 0 else nullcontext():
                _, residuals = stage.forward(stage.bind(leaves), [], [x], microbatch)
                after_f = storage_bytes(residuals.values, excluded)
                (_, kept), i = timed(lambda r=residuals, g=cotangent: stage.backward_input(r, [g], sums))
                after_i = storage_bytes(kept.values, excluded)
                _, w = timed(lambda k=kept: stage.backward_weight(k, sums))
            if repetition == 0:
                forwards = counter.calls / BLOCKS
            else:
                times.append((i, w))
    return after_f, after_i, forwards, [statistics.median(column) for column in zip(*times, strict=True)]


def torch_bytes(context: StageContext, leaves: list[Tensor]) -> tuple[int, int]:
    """(bytes after F, bytes after I) of torch, by distinct storage; parameters left out."""
    from torch.distributed.pipelining._backward import stage_backward_input

    own = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    saved: list[tuple[Any, int, int]] = []  # (whether it is still held, storage, bytes)

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def pack(tensor: Tensor) -> Held:
        held, storage = Held(tensor), tensor.untyped_storage()
        saved.append((weakref.ref(held), storage.data_ptr(), storage.nbytes()))
        return held

    parameters = {leaf.untyped_storage().data_ptr() for leaf in own}

    def alive() -> dict[int, int]:
        gc.collect()
        return {place: size for held, place, size in saved if held() is not None and place not in parameters}

    x = torch.randn(infer(context).boundary.values[0].shape, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        out, _ = context.run(context.stage.bind(own), [x], context.microbatch, [])
    after_f = sum(alive().values())
    _, groups = stage_backward_input((out,), (torch.randn(out.shape),), [x], iter(own))
    del out
    held = alive()
    for grad in (grad for group in groups for grads in group["grads"] or () for grad in grads or ()):
        if grad is not None:
            held[grad.untyped_storage().data_ptr()] = grad.untyped_storage().nbytes()
    return after_f, sum(held.values())


def main() -> None:
    """Print a table per family of blocks."""
    torch.set_num_threads(1)
    console = Console()
    console.print(describe_machine())
    for family in ACTIVATIONS:
        context, params = middle_stage(family, FEATURES, TOKENS, HEADS)
        leaves, joint = context.stage.leaves(params), capture(context)
        table = Table("made again", "W in I", "MB after F", "MB after I", "I / F", "of all", "forwards", "I ms", "W ms")
        table.title = f"two blocks of {family}, d={FEATURES}, T={TOKENS}"
        everything = ours(family, joint, context, leaves, Keep())[0]
        for keep in KEEPS:
            after_f, after_i, forwards, times = ours(family, joint, context, leaves, keep)
            sizes = (after_f / 1e6, after_i / 1e6, after_i / after_f, after_i / everything)
            cells = [f"{size:.2f}" for size in sizes] + [f"{forwards:.0f}"] + [f"{t / 1e3:.1f}" for t in times]
            table.add_row(keep.recompute or "nothing", f"{keep.early:.0%}", *cells)
        after_f, after_i = torch_bytes(context, leaves)
        cells = [f"{size:.2f}" for size in (after_f / 1e6, after_i / 1e6, after_i / after_f)]
        table.add_row("torch", "", *cells, "", "", "", "")
        console.print(table)


if __name__ == "__main__":
    main()

"""Tensor parallelism of an unmodified Llama: captured and cut, against torch's `parallelize_module` on the same module.

Two gloo processes, one thread each, tp=2, all in one stage: the graph engine, and compiled pieces, against the module as
`transformers`' own plan cuts it (q, k, v, gate, up by columns, o and down by rows, the head by columns and gathered), in
eager mode; `--compile` adds it under `torch.compile`. Loss and gradients of all are compared first. Steps alternate
(A B A B ...); reported are medians of the ratios of neighbours. CPU: time of the first process on its core, which other
programs disturb less.

Floors: the matrix products alone that one rank computes in a step, forward and backward; all exchanges of a step alone,
by gloo's all-reduce and over sockets; and products and exchanges over sockets together, with nothing between them.

Run: python bench/captured_tensor_parallel.py [--compile]
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from machine import describe_machine
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

import autofunc as af
from autofunc.shard.links import links
from autofunc.tree import flatten

REPETITIONS = 25
BLOCKS, VOCABULARY = 4, 256


class Size(NamedTuple):
    """Sizes of the model; the MLP is twice as wide as the blocks."""

    width: int
    tokens: int
    rows: int  # a microbatch
    microbatches: int


SIZES = [Size(256, 32, 1, 4), Size(256, 32, 1, 1), Size(256, 32, 4, 1), Size(512, 128, 1, 2)]
Step = Callable[[], Any]
Times = dict[str, list[tuple[float, float]]]  # (wall, CPU) in seconds


def llama(size: Size) -> nn.Module:
    """Build the model, with the same weights each time: 8 heads, 4 key heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=size.width, intermediate_size=2 * size.width, num_hidden_layers=BLOCKS, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=VOCABULARY, use_cache=False,
    )  # fmt: skip
    made: nn.Module = LlamaForCausalLM(config)
    return made


def parallelized(size: Size, mesh: DeviceMesh) -> nn.Module:
    """Cut it by its plan in transformers."""
    module, plan = llama(size), dict[str, ParallelStyle]()
    for name, _ in module.named_modules():
        last = name.rpartition(".")[2]
        if last in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            plan[name] = ColwiseParallel()
        elif last in ("o_proj", "down_proj"):
            plan[name] = RowwiseParallel()
    plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    return parallelize_module(module, mesh["tp"], plan)


def plain_loop(module: Any, batch: dict[str, Tensor], microbatches: int) -> float:
    """Run a step of a module as people write it: the mean loss, gradients in `.grad`."""
    module.zero_grad(set_to_none=True)
    total = 0.0
    rows = (part.chunk(microbatches) for part in batch.values())
    for leaves in zip(*rows, strict=True):
        loss = module(**dict(zip(batch, leaves, strict=True))).loss
        (loss / microbatches).backward()
        total += loss.detach() / microbatches
    return float(total)


def floors(size: Size, group: dist.ProcessGroup) -> dict[str, Step]:
    """The work that no step can avoid, on one of two ranks."""
    d, count = size.width, size.tokens * size.rows
    block = [(d, d // 2), (d, d // 4), (d, d // 4), (d // 2, d), (d, d), (d, d), (d, d)]
    products = [
        tuple(torch.randn(shape) for shape in ((count, inside), (out, inside), (count, out)))
        for inside, out in [*block * BLOCKS, (d, VOCABULARY // 2)]
    ]
    values = [torch.randn(count, d) for _ in range(4 * BLOCKS + 2)] + [torch.randn(count), torch.randn(3, count)]
    connected = links(group)
    assert connected is not None, "two ranks of one machine"

    def multiply() -> None:
        for x, weight, cotangent in products * size.microbatches:
            torch.mm(x, weight.t()), torch.mm(cotangent, weight), torch.mm(cotangent.t(), x)

    def reduce() -> None:
        for value in values * size.microbatches:
            dist.all_reduce(value, group=group)

    def exchange() -> None:
        for value in values * size.microbatches:
            own, other = connected.exchange([value, value])
            torch.add(own, other)

    def both() -> None:
        multiply()
        exchange()

    return {
        "products": multiply,
        "gloo": reduce,
        "sockets": exchange,
        "products, sockets": both,
    }


def steps_of(size: Size, mesh: DeviceMesh, compiled: bool) -> dict[str, Step]:
    """Build all contenders, after comparing losses and gradients."""
    ids = torch.randint(
        0, VOCABULARY, (size.rows * size.microbatches, size.tokens), generator=torch.Generator().manual_seed(0)
    )
    batch = {"input_ids": ids, "labels": ids}
    s = af.schedule.build("1f1b", num_ranks=1, num_microbatches=size.microbatches)
    module = parallelized(size, mesh)
    expected = plain_loop(module, batch, size.microbatches)
    gradients = {name: _whole(parameter.grad) for name, parameter in module.named_parameters()}
    steps: dict[str, Step] = {}
    options: tuple[tuple[str, dict[str, Any]], ...] = (("graph", {}), ("compiled", {"compile": True}))
    for name, chosen in options:
        pipe = af.pipeline(af.split(af.from_module(llama(size), batch), 1), s, mesh=mesh, **chosen)
        params, function = pipe.init(), af.value_and_grad(pipe)
        loss, found = function(params, batch)
        torch.testing.assert_close(loss.item(), expected, rtol=1e-5, atol=0)
        for path, leaf in flatten(pipe.gather(found)).items():
            torch.testing.assert_close(leaf, gradients[path], rtol=1e-3, atol=1e-6, msg=f"{name}: {path}")
        steps[name] = partial(function, params, batch)
    steps["torch"] = partial(plain_loop, module, batch, size.microbatches)
    if compiled:
        steps["torch.compile"] = partial(plain_loop, torch.compile(parallelized(size, mesh)), batch, size.microbatches)
    return steps | floors(size, mesh.get_group("tp"))


def _whole(leaf: Any) -> Tensor:
    return leaf.full_tensor() if isinstance(leaf, DTensor) else leaf


def measure(rank: int, store: str, results: str, compiled: bool) -> None:
    """Run one of two processes; the first writes the times."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    mesh = af.make_mesh(tp=2, device_type="cpu")
    found: list[Times] = []
    for size in SIZES:
        steps = steps_of(size, mesh, compiled)
        times: Times = {name: [] for name in steps}
        for repetition in range(REPETITIONS + 3):
            for name, step in steps.items():
                dist.barrier()
                cpu, wall = time.process_time(), time.perf_counter()
                step()
                if repetition >= 3:
                    times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
        found.append(times)
    if rank == 0:
        torch.save(found, results)
    dist.destroy_process_group()


def main() -> None:
    """Measure and print."""
    console = Console(width=160)
    with tempfile.TemporaryDirectory() as folder:
        store, results = str(Path(folder, "store")), str(Path(folder, "times.pt"))
        torch.multiprocessing.spawn(measure, (store, results, "--compile" in sys.argv[1:]), 2)
        found: list[Times] = torch.load(results)
    console.print(f"{describe_machine()}; load {', '.join(f'{load:.1f}' for load in os.getloadavg())}", highlight=False)
    names = list(found[0])
    for kind, which in (("wall", 0), ("CPU", 1)):
        table = Table(title=f"ms a step, {kind}; x: of torch's modules, medians of ratios")
        for column in ("d", "T", "rows", "microbatches", *names):
            table.add_column(column, justify="right")
        for size, times in zip(SIZES, found, strict=True):

            def cell(name: str, times: Times = times, which: int = which) -> str:
                own, theirs = ([each[which] for each in times[known]] for known in (name, "torch"))
                ratio = statistics.median(b / a for a, b in zip(own, theirs, strict=True))
                faster = "" if name not in ("graph", "compiled", "torch.compile") else f" ({ratio:.2f}x)"
                return f"{statistics.median(own) * 1e3:.1f}{faster}"

            table.add_row(*map(str, size), *map(cell, names))
        console.print(table)


if __name__ == "__main__":
    main()

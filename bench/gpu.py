"""What does a pipelined step cost on one accelerator, beside the plain microbatch loop?

Two models of transformers, as they are, with bf16 parameters: GPT-2 (24 blocks, d=1024, T=1024) and a Llama (8 blocks,
d=2048, T=2048). All ranks of a pipeline take turns on the one device, so no time is gained by overlap: what is measured is
what stages, schedule and runtime add or take away. Contenders take turns; medians. The plain loop adds gradients up in
bf16, autofunc in fp32.

MFU counts 3 times the operations of the forward. Peak bytes are the allocator's in a step: gradients and
activations, not parameters.

Run: python bench/gpu.py
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from machine import describe_machine
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import autofunc as af

MICROBATCHES = 8
RANKS = 2
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, by the vendor's data sheets
Step = Callable[[], Any]


def gpt2() -> Any:
    """345 million parameters."""
    sizes = {"n_embd": 1024, "n_layer": 24, "n_head": 16, "n_positions": 1024, "vocab_size": 50257}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    )


def llama() -> Any:
    """Half a billion parameters."""
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "num_attention_heads": 16}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, vocab_size=32000, max_position_embeddings=2048, use_cache=False)
    )


MODELS: Mapping[str, tuple[Callable[[], Any], int, int]] = {"gpt2": (gpt2, 1024, 4), "llama": (llama, 2048, 2)}
"""By name: how it is made, tokens of a row, rows of a microbatch."""


def plain_step(module: nn.Module, batch: Mapping[str, Tensor], *, compiled: bool) -> Step:
    """Loss and gradients of each microbatch, added up in `.grad`."""
    called = torch.compile(module) if compiled else module
    microbatches = [
        dict(zip(batch, rows, strict=True))
        for rows in zip(*(leaf.chunk(MICROBATCHES) for leaf in batch.values()), strict=True)
    ]

    def step() -> tuple[Tensor, list[Tensor | None]]:
        total = torch.zeros((), device=batch["input_ids"].device)
        for microbatch in microbatches:
            loss = called(**microbatch).loss / MICROBATCHES
            loss.backward()
            total += loss.detach()
        grads = [leaf.grad for leaf in module.parameters()]
        module.zero_grad(set_to_none=True)
        return total, grads

    return step


def piped_step(
    model: af.Model, params: Any, batch: Mapping[str, Tensor], name: str, **options: Any
) -> tuple[Step, af.Pipeline]:
    """A step, and its pipeline."""
    s = af.schedule.build(name, num_ranks=RANKS, num_microbatches=MICROBATCHES)
    pipe = af.pipeline(af.split(model, s.num_stages), s, **options)
    function = af.value_and_grad(pipe)
    return (lambda: function(params, batch)), pipe


def timed_ms(step: Step) -> float:
    """Until the device has done it."""
    torch.accelerator.synchronize()
    began = time.perf_counter()
    step()
    torch.accelerator.synchronize()
    return (time.perf_counter() - began) * 1e3


def peak_bytes(step: Step) -> int:
    """Of the allocator in one step, above what was there before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.accelerator.synchronize()
    return torch.cuda.max_memory_allocated() - before


def forward_flops(module: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """Operations of the matrix products of one forward of all rows."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(**{name: leaf[:1] for name, leaf in batch.items()})
    return int(counter.get_total_flops()) * batch["input_ids"].shape[0]


def measure(name: str, repetitions: int, console: Console, *, with_compiled: bool) -> None:
    """Print the tables of one model."""
    make, tokens, rows = MODELS[name]
    torch.manual_seed(0)
    module = make().to("cuda", torch.bfloat16)
    ids = torch.randint(0, 32000, (rows * MICROBATCHES, tokens), device="cuda")
    batch = {"input_ids": ids, "labels": ids}
    flops = 3 * forward_flops(module, batch)
    began = time.perf_counter()
    model = af.from_module(copy.deepcopy(module), batch)
    params = model.init(device="cuda", dtype=torch.bfloat16)
    console.print(f"{name}: captured in {time.perf_counter() - began:.1f} s")

    steps: dict[str, Step] = {"plain loop": plain_step(module, batch, compiled=False)}
    pipes: dict[str, af.Pipeline] = {}
    choices: dict[str, tuple[str, dict[str, Any]]] = {
        "1f1b": ("1f1b", {}),
        "zb_h1": ("zb_h1", {}),
        "1f1b, remat=layer": ("1f1b", {"remat": "layer"}),
    }
    if with_compiled:
        steps["plain loop, torch.compile"] = plain_step(module, batch, compiled=True)
        choices |= {f"{each}, compiled": (each, {"compile": True}) for each in ("1f1b", "zb_h1")}
    for title, (schedule_name, options) in choices.items():
        steps[title], pipes[title] = piped_step(model, params, batch, schedule_name, **options)

    peaks, first = {}, {}
    for title, step in steps.items():
        first[title] = timed_ms(step) / 1e3
        step()
        peaks[title] = peak_bytes(step)
    times: dict[str, list[float]] = {title: [] for title in steps}
    for _ in range(repetitions):
        for title, step in steps.items():
            times[title].append(timed_ms(step))

    peak = next((each for part, each in PEAK_FLOPS.items() if part in torch.cuda.get_device_name()), None)
    table = Table("step", "ms", "x plain", "MFU %", "peak GiB", "first s", title=f"{name}: {MICROBATCHES} microbatches")
    for title, found in times.items():
        ms = statistics.median(found)
        ratio = statistics.median(one / other for one, other in zip(found, times["plain loop"], strict=True))
        mfu = f"{100 * flops / (ms / 1e3) / peak:.1f}" if peak else "-"
        table.add_row(
            title, f"{ms:.1f}", f"{ratio:.3f}", mfu, f"{peaks[title] / 2**30:.2f}", f"{first[title]:.1f}"
        )  # fmt: skip
    console.print(table)
    costs_table = Table("stages of", "F ms", "I ms", "W ms", title=f"{name}: one microbatch, by stage")
    for title in (each for each in pipes if "remat" not in each and "zb" in each):
        costs = pipes[title].costs(params, batch, steps=3)
        columns: list[Any] = [costs.F, costs.I, costs.W]
        costs_table.add_row(title, *(" ".join(f"{each:.2f}" for each in column) for column in columns))
    console.print(costs_table)


def main() -> None:
    """Print what was measured on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--without-compiled", action="store_true", help="leave out what is compiled first")
    arguments = parser.parse_args()
    console = Console()
    if not torch.cuda.is_available():
        raise SystemExit("bench/gpu.py needs a GPU")
    console.print(f"{torch.cuda.get_device_name()}; {describe_machine()}; transformers {transformers.__version__}")
    for name in arguments.models:
        measure(name, arguments.repetitions, console, with_compiled=not arguments.without_compiled)


if __name__ == "__main__":
    main()

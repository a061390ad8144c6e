"""What does a pipelined step cost on one accelerator, beside the plain microbatch loop and torch's own pipeline?

Two unmodified models of transformers with bf16 parameters: GPT-2 (24 blocks, d=1024, T=1024) and a Llama (8 blocks,
d=2048, T=2048). All stages of a pipeline take turns on the one device, so overlap gains no time: measured is what
stages, schedule and runtime add or save. Contenders take turns; medians. The plain loop and torch's pipeline accumulate
gradients in bf16, autofunc in fp32.

MFU counts 3 times the operations of the forward. Peak bytes are a step's memory beyond parameters and batch: the
allocator's peak, slots and sums that stay, and for recorded steps everything that the pool of their graphs reserves.

It prints tables in Markdown. A model takes less than two minutes on an H100: rounds end when the time is up.

Run: python bench/gpu.py --model gpt2
     python bench/gpu.py --model llama --only '^(?!zb_h1, compiled)'   # compiling takes most of the time
"""

from __future__ import annotations

import argparse
import copy
import gc
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import transformers
from machine import describe_machine
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleInterleaved1F1B
from torch.utils.flop_counter import FlopCounterMode

import autofunc as af
from autofunc.engine.device_speed import peak_tflops

MICROBATCHES = 8
RANKS = 2
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
"""By name: builder, tokens per row, rows per microbatch."""


def plain_step(module: nn.Module, batch: Mapping[str, Tensor], *, compiled: bool) -> Step:
    """Run each microbatch's loss and gradients, accumulated in `.grad`."""
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


class Half(nn.Module):
    """Half of a model of transformers, which shares its parameters: a stage for torch's pipeline.

    Args:
        module: all of it.
        last: the second half, which takes hidden states and ends in logits.
    """

    def __init__(self, module: Any, last: bool) -> None:
        super().__init__()
        self.head = module.lm_head if last else None
        inner = copy.copy(module.base_model)
        inner._modules = dict(inner._modules)
        blocks, norm, positions = ("h", "ln_f", "wpe") if hasattr(inner, "h") else ("layers", "norm", None)
        halfway = len(getattr(inner, blocks)) // 2
        setattr(inner, blocks, getattr(inner, blocks)[halfway:] if last else getattr(inner, blocks)[:halfway])
        if not last:
            setattr(inner, norm, nn.Identity())
        elif positions is not None:
            setattr(inner, positions, _Nothing())
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, T) to hidden states (B, T, D), or these to logits (B, T, V)."""
        if self.head is None:
            return self.inner(input_ids=x).last_hidden_state  # type: ignore[no-any-return]
        return self.head(self.inner(inputs_embeds=x).last_hidden_state)  # type: ignore[no-any-return]


class _Nothing(nn.Module):
    """Replaces the positions, which the first half has added."""

    def forward(self, positions: Tensor) -> Tensor:
        """Return a zero."""
        return torch.zeros((), device=positions.device)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the loss as transformers does, for one of several microbatches."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()) / MICROBATCHES


def torch_pipeline_step(module: Any, batch: Mapping[str, Tensor], *, compiled: bool) -> Step:
    """Torch's 1F1B over two stages of this process, which passes values on without sending them."""
    ids, config = batch["input_ids"], module.config
    rows = ids[: len(ids) // MICROBATCHES]
    empty = {"dtype": module.dtype, "device": ids.device, "requires_grad": True}
    hidden = torch.empty(*rows.shape, config.hidden_size, **empty)
    logits = torch.empty(*rows.shape, config.vocab_size, **empty)
    stages: list[Any] = []
    for number, (given, made) in enumerate(((rows, hidden), (hidden, logits))):
        half = Half(module, last=number == 1)
        called: Any = torch.compile(half, dynamic=False) if compiled else half
        stages.append(PipelineStage(called, number, RANKS, ids.device, input_args=given, output_args=made))
    schedule = ScheduleInterleaved1F1B(stages, MICROBATCHES, loss_fn=next_token_loss, scale_grads=False)

    def step() -> tuple[Tensor, list[Tensor | None]]:
        losses: list[Tensor] = []
        schedule.step(ids, target=batch["labels"], losses=losses, return_outputs=False)
        grads = [leaf.grad for leaf in module.parameters()]
        module.zero_grad(set_to_none=True)
        return torch.stack([loss.detach() for loss in losses]).sum(), grads

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
    """Time a call until the device has finished it."""
    torch.accelerator.synchronize()
    began = time.perf_counter()
    step()
    torch.accelerator.synchronize()
    return (time.perf_counter() - began) * 1e3


def pools_free_bytes() -> int:
    """Return the bytes that pools of graphs reserve beyond their allocations: graphs write there."""
    snapshot: Any = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    segments = [each for each in snapshot if tuple(each["segment_pool_id"]) != (0, 0)]
    return sum(each["total_size"] - each["allocated_size"] for each in segments)


class Begun(NamedTuple):
    """Measurements of a contender's first steps."""

    first_s: float
    peak_bytes: int
    loss: float


def begin(step: Step) -> Begun:
    """Run steps until everything is compiled and recorded, then measure the memory of one more."""
    gc.collect()
    torch.accelerator.synchronize()
    before, free_before = torch.cuda.memory_allocated(), pools_free_bytes()
    first_s = timed_ms(step) / 1e3
    step()
    step()
    torch.cuda.reset_peak_memory_stats()
    loss = float(step()[0])
    torch.accelerator.synchronize()
    return Begun(first_s, torch.cuda.max_memory_allocated() - before + pools_free_bytes() - free_before, loss)


def forward_flops(module: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """Count the operations of the matrix products in one forward of all rows."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(**{name: leaf[:1] for name, leaf in batch.items()})
    return int(counter.get_total_flops()) * batch["input_ids"].shape[0]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)) + "\n"


CHOICES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "1f1b": ("1f1b", {}),
    "zb_h1": ("zb_h1", {}),
    '1f1b, `remat="layer"`': ("1f1b", {"remat": "layer"}),
    "1f1b, graphs": ("1f1b", {"compile": "graphs"}),
    "zb_h1, graphs": ("zb_h1", {"compile": "graphs"}),
    "1f1b, compiled": ("1f1b", {"compile": True}),
    "zb_h1, compiled": ("zb_h1", {"compile": True}),
    "1f1b, compiled, graphs": ("1f1b", {"compile": "inductor+graphs"}),
    "zb_h1, compiled, graphs": ("zb_h1", {"compile": "inductor+graphs"}),
}
"""By title: schedule, and options of the pipeline."""


def measure(name: str, device: str, repetitions: int, seconds: float, wanted: re.Pattern[str]) -> None:
    """Print one model's tables: the plain loop, and the contenders whose titles match."""
    began = time.perf_counter()
    make, tokens, rows = MODELS[name]
    torch.manual_seed(0)
    module = make().to(device, torch.bfloat16)
    ids = torch.randint(0, module.config.vocab_size, (rows * MICROBATCHES, tokens), device=device)
    batch = {"input_ids": ids, "labels": ids}
    flops = 3 * forward_flops(module, batch)
    captured = time.perf_counter()
    model = af.from_module(copy.deepcopy(module), batch)
    params = model.init(device=device, dtype=torch.bfloat16)
    print(f"{name}: {MICROBATCHES} microbatches of {rows} x {tokens} tokens; ", end="")
    print(f"captured in {time.perf_counter() - captured:.1f} s")

    steps: dict[str, Step] = {"plain loop": plain_step(module, batch, compiled=False)}
    for title, make_step in (("plain loop", plain_step), ("torch's 1F1B", torch_pipeline_step)):
        for label, compiled in ((title, False), (f"{title}, `torch.compile`", True)):
            if label not in steps and wanted.search(label):
                steps[label] = make_step(module, batch, compiled=compiled)
    pipes: dict[str, af.Pipeline] = {}
    for title, (schedule_name, options) in CHOICES.items():
        if wanted.search(title):
            steps[title], pipes[title] = piped_step(model, params, batch, schedule_name, **options)

    found: dict[str, Begun] = {}
    for title, step in list(steps.items()):
        try:
            found[title] = begin(step)
        except (af.AutofuncError, RuntimeError) as error:  # the others are worth knowing all the same
            print(f"{title}: {type(error).__name__}: {str(error).splitlines()[0]}")
            print(error, file=sys.stderr)
            del steps[title]
            pipes.pop(title, None)
    times: dict[str, list[float]] = {title: [] for title in steps}
    for round_number in range(repetitions):
        if round_number >= 3 and time.perf_counter() - began > seconds:
            break
        for title, step in steps.items():
            times[title].append(timed_ms(step))

    tflops = peak_tflops(torch.device(device))
    lines = []
    for title, each in times.items():
        ms, first = statistics.median(each), found[title]
        ratio = statistics.median(one / other for one, other in zip(each, times["plain loop"], strict=True))
        mfu = f"{100 * flops / (ms / 1e3) / (tflops * 1e12):.1f} %" if tflops else "-"
        gib, loss = f"{first.peak_bytes / 2**30:.2f}", f"{first.loss:.4f}"
        lines.append((title, f"{ms:.1f}", f"{ratio:.3f}", mfu, gib, f"{first.first_s:.1f}", loss))
    print(f"{len(times['plain loop'])} rounds\n")
    print(markdown(("step", "ms", "x plain", "MFU", "peak GiB", "first step s", "loss"), lines))
    costed = [title for title in pipes if title.startswith("zb_h1")]
    for title in [*pipes]:
        if title not in costed:
            pipes.pop(title).close()
    steps.clear()
    cost_lines: list[Sequence[str]] = []
    for title in costed:
        costs = pipes[title].costs(params, batch, steps=3)
        columns: list[Any] = [costs.F, costs.I, costs.W]
        cost_lines.append((title, *(", ".join(f"{each:.2f}" for each in column) for column in columns)))
        pipes.pop(title).close()
        gc.collect()
        torch.cuda.empty_cache()
    print(markdown(("one microbatch, by stage", "F ms", "I ms", "W ms"), cost_lines))
    print(f"{name}: {time.perf_counter() - began:.0f} s in all", flush=True)


def main() -> None:
    """Print the machine, then all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=80, help="of a model, after which no round begins")
    parser.add_argument("--only", type=re.compile, default=re.compile(""), help="a pattern that titles of contenders match")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench/gpu.py needs a GPU")
    print(f"{torch.cuda.get_device_name()}; {describe_machine()}; transformers {transformers.__version__}")
    # torch's pipeline asks for a group, and sends nothing by it where all stages are in one process
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=1)
    for name in arguments.model:
        measure(name, "cuda", arguments.repetitions, arguments.seconds, arguments.only)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""How much Python does a pipeline run per stage and microbatch, besides the model's own work?

One process plays rank 1 of 4 on a fake process group: sends and receives return at once, so only Python remains. A
stage is one operator, `x * w` on four numbers, with 32 microbatches. autofunc and `torch.distributed.pipelining` take
turns (A B A B ...) on the same schedule.

Raw is the time of a step over its stage-microbatches: F, backward and their sends and receives. Net is raw without the
time of one F and one whole backward, called alone in a loop: torch's module and `torch.autograd.backward`, autofunc's
stage `forward` and `backward`. The cost of splitting the backward stays in, on both sides.

Run: python bench/python_overhead.py
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from machine import describe_machine
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

# Private parts of torch, tried with 2.13.0: the fake process group, and what a schedule does before its first step.
from torch.distributed.pipelining._utils import InferenceMode
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, _PipelineSchedule, get_schedule_class
from torch.testing._internal.distributed.fake_pg import FakeStore

import autofunc as af
from autofunc.engine import GraphStage, Microbatch, capture
from autofunc.engine.graph import COMPUTATIONS
from autofunc.runtime.accumulate import Accumulator
from autofunc.splitting import follow
from autofunc.tree import flatten

RANK, RANKS, MICROBATCHES, WIDTH = 1, 4, 32, 4
SCHEDULES = {  # autofunc's name -> torch's
    "1f1b": "1F1B",
    "interleaved_1f1b": "Interleaved1F1B",
    "zbv": "ZBVZeroBubble",
    "dualpipe_v": "DualPipeV",
}
TARGET = 0.4  # ours / torch, net
CALLS = 10  # steps of one measurement


class Scale(nn.Module):
    """torch's stage."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """One operator."""
        return x * self.w


def scale_model(num_stages: int) -> af.Model:
    """The same stages as layers."""
    layer = af.Layer(
        init=lambda key: {"w": key.ones("w", (1,))},
        apply=lambda params, x, batch: (batch["x"] if x is None else x) * params["w"],
    )
    return af.Model({f"scale_{index}": layer for index in range(num_stages)})


def sum_of(outputs: Tensor, microbatch: Mapping[str, Any]) -> Tensor:
    """The loss; no stage measured here runs it, because rank 1 does not have the last stage."""
    return outputs.sum()


def torch_step(name: str, numbers: list[int], num_stages: int) -> Callable[[], Any]:
    """Return a step of torch on this rank's stages."""

    def example() -> Tensor:
        return torch.zeros(1, WIDTH, requires_grad=True)

    stages = [
        PipelineStage(Scale(), number, num_stages, torch.device("cpu"), input_args=example(), output_args=example())
        for number in numbers
    ]
    kind: Callable[..., Any] = get_schedule_class(name)
    is_multi = issubclass(get_schedule_class(name), PipelineScheduleMulti)
    schedule = kind(stages if is_multi else stages[0], MICROBATCHES, loss_fn=lambda output, target: output.sum())

    def step() -> None:
        for stage in stages:
            stage.submod.zero_grad(set_to_none=True)
        schedule.step(return_outputs=False)

    return step


def autofunc_step(s: af.schedule.Schedule, mesh: Any) -> Callable[[], Any]:
    """Return a step of autofunc on this rank's stages."""
    stages = af.split(scale_model(s.num_stages), s.num_stages)
    pipe = af.pipeline(stages, s, loss=sum_of, mesh=mesh)
    params, batch = pipe.init(), {"x": torch.zeros(MICROBATCHES, WIDTH)}
    value_and_grad = af.value_and_grad(pipe)
    return lambda: value_and_grad(params, batch)


def torch_compute() -> Callable[[], Any]:
    """Return F and backward of torch's stage alone."""
    module, x, cotangent = Scale(), torch.zeros(1, WIDTH, requires_grad=True), torch.zeros(1, WIDTH)
    return lambda: torch.autograd.backward((module(x),), (cotangent,))


def autofunc_compute() -> Callable[[], Any]:
    """Return F and backward of autofunc's stage alone: a middle stage, like rank 1's."""
    model = scale_model(RANKS)
    stages, params = af.split(model, RANKS), flatten(model.init())
    microbatch = {"x": torch.zeros(1, WIDTH)}
    context = follow(stages, params, microbatch, sum_of)[0][RANK]
    engine = GraphStage(capture(context), context)
    engine.make(COMPUTATIONS)
    leaves = stages[RANK].leaves(params)
    bound, sums = engine.bind(leaves), Accumulator(context.accumulator_layouts, context.device)
    x, cotangent = torch.zeros(1, WIDTH), torch.zeros(1, WIDTH)
    prepared = Microbatch.of(microbatch)

    def call() -> None:
        with torch.no_grad():
            _, residuals = engine.forward(bound, [], [x], prepared)
            engine.backward(residuals, [cotangent], sums)

    return call


def microseconds(call: Callable[[], Any], calls: int) -> float:
    """Return the mean wall time of a call."""
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - began) / calls * 1e6


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repetitions", type=int, default=15)
    repetitions = options.parse_args().repetitions
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=RANKS)
    mesh = af.make_mesh(pp=RANKS, device_type="cpu")

    def no_vote(self: Any, stages: list[Any], has_backward: bool, p2p_done: bool) -> None:
        for stage in stages:
            stage._inference_mode = InferenceMode.STATIC

    _PipelineSchedule._warmup_p2p = no_vote  # it waits for what other ranks say about shapes, and here there are none

    compute = {"torch": torch_compute(), "autofunc": autofunc_compute()}
    steps: dict[tuple[str, str], Callable[[], Any]] = {}
    stage_microbatches: dict[str, int] = {}
    for ours, theirs in SCHEDULES.items():
        s = af.schedule.build(ours, num_ranks=RANKS, num_microbatches=MICROBATCHES)
        numbers = list(s.stages_of(RANK))
        stage_microbatches[ours] = len(numbers) * MICROBATCHES
        steps["torch", ours] = torch_step(theirs, numbers, s.num_stages)
        steps["autofunc", ours] = autofunc_step(s, mesh)
    for step in steps.values():
        for _ in range(3):
            step()
    raw: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    own: dict[str, list[float]] = {side: [] for side in compute}
    for _ in track(range(repetitions), description="measuring", transient=True):
        for side, call in compute.items():
            own[side].append(microseconds(call, CALLS * MICROBATCHES))
        for (side, name), step in steps.items():
            raw[side, name].append(microseconds(step, CALLS) / stage_microbatches[name])
    report(raw, own)


def report(raw: Mapping[tuple[str, str], list[float]], own: Mapping[str, list[float]]) -> None:
    """Print medians; ratios are taken repetition by repetition."""
    console = Console()
    console.print(describe_machine())
    alone = {side: statistics.median(times) for side, times in own.items()}
    console.print(f"F and backward alone: torch {alone['torch']:.1f} us, autofunc {alone['autofunc']:.1f} us")
    table = Table(title="us of Python per stage-microbatch; ratio is autofunc / torch")
    for column in ("schedule", "torch\nraw", "torch\nnet", "ours\nraw", "ours\nnet", "ratio\nraw", "ratio\nnet"):
        table.add_column(column, justify="left" if column == "schedule" else "right")
    for name in SCHEDULES:
        sides = {side: raw[side, name] for side in ("torch", "autofunc")}
        net = {side: [a - b for a, b in zip(times, own[side], strict=True)] for side, times in sides.items()}
        cells = [statistics.median(times) for side in sides for times in (sides[side], net[side])]
        ratios = [
            statistics.median(a / b for a, b in zip(times["autofunc"], times["torch"], strict=True))
            for times in (sides, net)
        ]
        verdict = "" if ratios[1] <= TARGET else f" > {TARGET}"
        table.add_row(name, *(f"{cell:.1f}" for cell in cells), f"{ratios[0]:.2f}", f"{ratios[1]:.2f}{verdict}")
    console.print(table)


if __name__ == "__main__":
    main()

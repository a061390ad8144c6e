"""Is a pipelined step of autofunc faster than one of `torch.distributed.pipelining`?

`af.bench` on the same GPT-2 (see `torch_model.py`) with the same weights in the same memory, on two gloo processes with one
thread each; torch's stages are modules written for it. A step is the loss and the gradients from given parameters: torch
drops its old gradients and steps, autofunc drops its old result and calls `value_and_grad`.

Settings: small, dominated by Python and launches (8 blocks, d=64, T=32, 32 microbatches); large, by matrix products (12
blocks, d=768, T=128, 8 microbatches); words, by the head (6 blocks, d=768, T=256, 8 microbatches, 50,257 words). A
microbatch has one row. Both sides have the same stages: equal numbers of blocks, and in words those that
`split_points: auto` chooses.

Run: python bench/against_torch.py --setting small --repetitions 9
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no compiler workers competing with timed steps
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from machine import describe_machine
from rich.console import Console
from rich.table import Table
from torch_model import TorchStage, cut, mean_loss_of, random_batch, untied_gpt2

import autofunc as af
from autofunc.benchmark import Measured, Results
from autofunc.benchmark.torch_names import TORCH_SCHEDULES

RANKS = 2
SPLIT_BACKWARD = ("zb_h1", "zb_h2", "interleaved_zb", "zbv", "v_half", "v_min", "dualpipe_v")  # I and W apart
SPLIT_BACKWARD_OF_TORCH = tuple(name for name, each in TORCH_SCHEDULES.items() if each.splits_backward)


class Setting(NamedTuple):
    """Sizes of the model and the step."""

    features: int
    tokens: int
    blocks: int
    heads: int
    microbatches: int
    vocab: int
    balanced: bool  # stages by counted work, not by numbers of blocks
    steps: int  # of a turn, of which the median counts: short steps feel every hiccup of the machine


SETTINGS = {
    "small": Setting(64, 32, 8, 4, 32, vocab=64, balanced=False, steps=5),
    "large": Setting(768, 128, 12, 12, 8, vocab=64, balanced=False, steps=1),
    "words": Setting(768, 256, 6, 12, 8, vocab=50257, balanced=True, steps=1),
}


def stages_of(model: af.Model, setting: Setting, number: int) -> list[Any]:
    """The model in a number of stages."""
    return af.split(model, "auto", num_stages=number) if setting.balanced else cut(model, number)


def measure(rank: int, store: str, folder: str, name: str, compiles: bool, only: Sequence[str], repetitions: int) -> None:
    """One of two processes; the first writes the results."""
    torch.set_num_threads(1)
    os.environ["RANK"] = str(rank)  # the first shows how far it is
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    setting = SETTINGS[name]
    model = untied_gpt2(setting.vocab, setting.tokens, setting.features, setting.blocks, setting.heads)
    results = af.bench(
        model, random_batch(setting.vocab, setting.microbatches, setting.tokens), loss=mean_loss_of, pp=[RANKS],
        schedules=af.schedule.names(), microbatches=[setting.microbatches], compile=[False, True] if compiles else [False],
        against=["torch"], torch_schedules=list(TORCH_SCHEDULES), torch_module=partial(TorchStage, config=model.config),
        split_points=partial(stages_of, model, setting), only=only, repetitions=repetitions, steps=setting.steps,
    )  # fmt: skip
    if rank == 0:
        results.save(folder)
    dist.barrier()
    dist.destroy_process_group()


def questions(results: Results) -> Iterator[tuple[str, list[Measured], list[Measured]]]:
    """(question, contenders of autofunc, contenders of torch), the fastest by median first."""
    ours, theirs = results.of("autofunc"), results.of("torch")
    yield "(a) best, torch eager", ours, [each for each in theirs if not each.contender.compile]
    yield "(b) best, torch compiled", ours, [each for each in theirs if each.contender.compile]
    split = [each for each in theirs if each.contender.schedule in SPLIT_BACKWARD_OF_TORCH]
    yield "(c) zero-bubble", [each for each in ours if each.contender.schedule in SPLIT_BACKWARD], split
    same = [each for each in ours if each.contender.schedule == "1f1b"]
    compiled = [each for each in same if each.contender.compile]
    yield "(d) 1F1B", compiled or same, [each for each in theirs if each.contender.schedule == "1F1B"]
    yield "(e) best against best", ours, theirs


def report(console: Console, name: str, results: Results) -> None:
    """Print the tables, and the answers with all ratios."""
    console.print(f"{name}: {', '.join(f'{field} {value}' for field, value in SETTINGS[name]._asdict().items())}")
    console.print(results.table(), highlight=False)
    answers = Table("question", "fastest by median", "ratios", "median", title="torch / autofunc, each repetition")
    for question, ours, theirs in questions(results):
        if ours and theirs:
            ratios = [b / a for a, b in zip(ours[0].step_ms, theirs[0].step_ms, strict=True)]
            each = " ".join(f"{ratio:.2f}" for ratio in ratios)
            median = f"{results.speedup(ours[0], theirs[0]).median:.2f}"
            answers.add_row(question, f"{ours[0].name}\n{theirs[0].name}", each, median, end_section=True)
    console.print(answers)


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--setting", choices=[*SETTINGS, "all"], default="all")
    options.add_argument("--repetitions", type=int, default=9)
    options.add_argument("--no-compile", action="store_true", help="leave out compiled contenders")
    options.add_argument("--only", nargs="+", default=["*"], metavar="GLOB", help="such as 'torch *' 'autofunc 1f1b *'")
    options.add_argument("--output", type=Path, help="a folder for bench.json, bench.png and bench.html of each setting")
    given = options.parse_args()
    console = Console()
    console.print(describe_machine())
    for name in SETTINGS if given.setting == "all" else [given.setting]:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "results" if given.output is None else given.output / name
            arguments: tuple[Any, ...] = (f"{scratch}/store", str(folder), name, not given.no_compile, given.only)
            torch.multiprocessing.spawn(measure, (*arguments, given.repetitions), RANKS)
            report(console, name, Results.read(folder / "bench.json"))


if __name__ == "__main__":
    main()

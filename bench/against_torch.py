"""Is a pipelined step of autofunc faster than one of `torch.distributed.pipelining`?

The same GPT-2 (see `torch_model.py`) with the same weights in the same memory, on two gloo processes with one thread each.
All contenders take turns inside every repetition, each step from a barrier on, and the slower rank counts. A step is the
loss and the gradients from given parameters: torch drops its old gradients and steps, autofunc drops its old result and
calls `value_and_grad`. Before anything is timed, every contender's gradients are compared with the plain loop's.

Settings: small, where Python and launches cost most (8 blocks, d=64, T=32, 32 microbatches), and large, where matrix
products do (12 blocks, d=768, T=128, 8 microbatches); one row a microbatch, vocabulary 64.

Run: python bench/against_torch.py --setting small --repetitions 9
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no workers of the compiler beside what is timed

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from machine import describe_machine
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch_model import (
    COMPILABLE,
    TOLERANCE,
    TORCH_SCHEDULES,
    TorchPipeline,
    TorchStage,
    cut,
    error,
    local_modules,
    mean_loss_of,
    random_batch,
    untied_gpt2,
)

import autofunc as af
from autofunc.errors import ScheduleError
from autofunc.tree import flatten, to_tensordict

RANKS = 2
VOCAB = 64
COMPILED = ("1f1b", "interleaved_1f1b", "zb_h1", "zb_h2", "interleaved_zb", "zbv")  # of autofunc
SPLIT_BACKWARD = {  # zero-bubble schedules and their kin: I and W apart
    "autofunc": ("zb_h1", "zb_h2", "interleaved_zb", "zbv", "v_half", "v_min", "dualpipe_v"),
    "torch": ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"),
}


class Setting(NamedTuple):
    """Sizes of the model and the step."""

    features: int
    tokens: int
    blocks: int
    heads: int
    microbatches: int
    steps: int  # of a turn, of which the median counts: short steps feel every hiccup of the machine


SETTINGS = {"small": Setting(64, 32, 8, 4, 32, 5), "large": Setting(768, 128, 12, 12, 8, 1)}


class Label(NamedTuple):
    """Which contender."""

    side: str  # "autofunc" or "torch"
    schedule: str
    compiled: bool

    def __str__(self) -> str:
        plain = "graph" if self.side == "autofunc" else "eager"  # autofunc's graph engine, without a compiler
        return f"{self.side} {self.schedule} {'compiled' if self.compiled else plain}"


@dataclass(frozen=True)
class Contender:
    """A step to be timed, and its gradients to be checked."""

    label: Label
    step: Callable[[], Any]
    grads: Callable[[], Mapping[str, Tensor]]


def labels(microbatches: int, with_compile: bool, only: Sequence[str]) -> list[Label]:
    """All contenders that are legal here; the sides alternate, so that each meets the same state of the machine."""
    theirs = [
        Label("torch", name, compiled)
        for compiled in (False, True)
        for name in (COMPILABLE if compiled else TORCH_SCHEDULES)
    ]
    ours = [Label("autofunc", name, False) for name in af.schedule.names() if _is_legal(name, microbatches)]
    ours += [Label("autofunc", name, True) for name in COMPILED if with_compile]
    mixed: list[Label] = []
    for index in range(max(len(ours), len(theirs))):
        mixed += [*ours[index : index + 1], *theirs[index : index + 1]]
    return [label for label in mixed if any(fnmatchcase(str(label), pattern) for pattern in only)]


def _is_legal(name: str, microbatches: int) -> bool:
    try:
        af.schedule.build(name, num_ranks=RANKS, num_microbatches=microbatches)
    except ScheduleError:
        return False
    return True


class Builder:
    """Makes one rank's contenders. Those of one placement share their weights, on both sides."""

    def __init__(self, rank: int, setting: Setting) -> None:
        self.rank, self.setting = rank, setting
        self.model = untied_gpt2(VOCAB, setting.tokens, setting.features, setting.blocks, setting.heads)
        self.batch = random_batch(VOCAB, setting.microbatches, setting.tokens)
        self.mesh = af.make_mesh(pp=RANKS, device_type="cpu")
        self._params = flatten(self.model.init())
        self._modules: dict[tuple[int, bool], dict[int, TorchStage]] = {}
        self._last: list[Any] = []  # the last result of autofunc, alive until the next step, as in a training loop

    def reference(self) -> Mapping[str, Tensor]:
        """The gradients of the plain loop."""
        loop = af.reference_value_and_grad(self.model, mean_loss_of, self.setting.microbatches)
        return flatten(loop(self._params, self.batch)[1])

    def build(self, label: Label) -> Contender:
        """One contender."""
        return self._torch(label) if label.side == "torch" else self._autofunc(label)

    def modules(self, placement: tuple[int, bool]) -> dict[int, TorchStage]:
        """This rank's modules for (stages a rank, whether in a V)."""
        if placement not in self._modules:
            self._modules[placement] = local_modules(self.model, self._params, self.rank, RANKS, *placement)
        return self._modules[placement]

    def _torch(self, label: Label) -> Contender:
        placement = TORCH_SCHEDULES[label.schedule]
        pipe = TorchPipeline(
            label.schedule,
            self.modules(placement),
            RANKS * placement[0],
            self.setting.microbatches,
            self.batch["input_ids"],
            self.model.config,
            label.compiled,
        )
        return Contender(label, lambda: pipe.step(self.batch), pipe.grads)

    def _autofunc(self, label: Label) -> Contender:
        s = af.schedule.build(label.schedule, num_ranks=RANKS, num_microbatches=self.setting.microbatches)
        stages = cut(self.model, s.num_stages)
        in_v = s.num_stages > RANKS and s.placement[RANKS - 1] == s.placement[RANKS]
        modules = self.modules((s.num_stages // RANKS, in_v))
        held = {path: leaf.detach() for module in modules.values() for path, leaf in module.by_path.items()}
        params = to_tensordict(held)
        pipe = af.pipeline(stages, s, loss=mean_loss_of, mesh=self.mesh, engine="graph", compile=label.compiled)
        value_and_grad = af.value_and_grad(pipe)

        def step() -> Any:
            self._last.clear()
            self._last.append(value_and_grad(params, self.batch))

        return Contender(label, step, lambda: flatten(self._last[0][1]))


def measure(rank: int, store: str, results: str, name: str, chosen: list[Label], repetitions: int) -> None:
    """One of two processes: writes its seconds per contender and repetition."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    builder = Builder(rank, SETTINGS[name])
    expected = builder.reference()

    def shown(items: Sequence[Any], what: str) -> Iterator[Any]:
        yield from track(items, description=f"{name}: {what}", disable=rank != 0, transient=True)

    contenders = []
    for label in shown(chosen, "building and checking"):
        contender = builder.build(label)
        contender.step()
        found = contender.grads()
        worst = error(found, {path: expected[path] for path in found})
        if worst > TOLERANCE:
            raise AssertionError(f"rank {rank}, {label}: gradients differ by {worst:.1e} from the plain loop's")
        contender.step()  # allocators and connections are warm from here on
        contenders.append(contender)
    del expected
    gc.collect()
    gc.freeze()  # the collector walks what a step makes, not what all the other contenders are
    seconds: dict[Label, list[float]] = {label: [] for label in chosen}
    for _ in shown(range(repetitions), "measuring"):
        for contender in contenders:
            for _ in range(SETTINGS[name].steps):
                dist.barrier()
                began = time.perf_counter()
                contender.step()
                seconds[contender.label].append(time.perf_counter() - began)
    torch.save({tuple(label): times for label, times in seconds.items()}, f"{results}.{rank}")
    dist.barrier()
    dist.destroy_process_group()


def step_times_ms(name: str, chosen: list[Label], repetitions: int) -> dict[Label, list[float]]:
    """Milliseconds of each contender's turns: the median of its steps, of which the slower rank counts each time."""
    with tempfile.TemporaryDirectory() as folder:
        results = f"{folder}/seconds"
        torch.multiprocessing.spawn(measure, (f"{folder}/store", results, name, chosen, repetitions), RANKS)
        ranks = [torch.load(f"{results}.{rank}") for rank in range(RANKS)]
    each, found = SETTINGS[name].steps, {}
    for label in chosen:
        slower = [max(times) * 1e3 for times in zip(*(times_of[tuple(label)] for times_of in ranks), strict=True)]
        found[label] = [statistics.median(slower[first : first + each]) for first in range(0, len(slower), each)]
    return found


def questions(found: Mapping[Label, list[float]]) -> Iterator[tuple[str, list[Label], list[Label]]]:
    """(question, contenders of autofunc, contenders of torch); of each the fastest by median answers."""
    ours = [label for label in found if label.side == "autofunc"]
    theirs = [label for label in found if label.side == "torch"]
    split = [label for label in found if label.schedule in SPLIT_BACKWARD[label.side]]
    yield "(a) best, torch eager", ours, [label for label in theirs if not label.compiled]
    yield "(b) best, torch compiled", ours, [label for label in theirs if label.compiled]
    yield "(c) zero-bubble", [label for label in ours if label in split], [label for label in theirs if label in split]
    same = [label for label in ours if label.schedule == "1f1b"]
    compiled = [label for label in same if label.compiled]
    yield "(d) 1F1B", compiled or same, [label for label in theirs if label.schedule == "1F1B"]
    yield "(e) best against best", ours, theirs


def report(console: Console, name: str, found: Mapping[Label, list[float]]) -> None:
    """Print the table of step times and the answers."""
    medians = {label: statistics.median(times) for label, times in found.items()}
    sizes = ", ".join(f"{field} {value}" for field, value in SETTINGS[name]._asdict().items())
    console.print(f"{name}: {sizes}")
    times = Table("contender", "step_time_ms", "least", "most")
    for label in sorted(medians, key=medians.__getitem__):
        cells = (medians[label], min(found[label]), max(found[label]))
        times.add_row(str(label), *(f"{cell:.1f}" for cell in cells))
    console.print(times)
    answers = Table("question", "fastest by median", "ratios", "median", title="autofunc / torch, each repetition")
    for question, ours, theirs in questions(found):
        if not ours or not theirs:
            continue
        pair = [min(side, key=medians.__getitem__) for side in (ours, theirs)]
        ratios = [a / b for a, b in zip(*(found[label] for label in pair), strict=True)]
        names = "\n".join(f"{label}" for label in pair)
        each = " ".join(f"{ratio:.2f}" for ratio in ratios)
        answers.add_row(question, names, each, f"{statistics.median(ratios):.2f}", end_section=True)
    console.print(answers)


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--setting", choices=[*SETTINGS, "both"], default="both")
    options.add_argument("--repetitions", type=int, default=9)
    options.add_argument("--no-compile", action="store_true", help="leave out autofunc's compiled contenders")
    options.add_argument("--only", nargs="+", default=["*"], metavar="GLOB", help="such as 'torch *' 'autofunc 1f1b *'")
    given = options.parse_args()
    console = Console()
    console.print(describe_machine())
    for name in SETTINGS if given.setting == "both" else [given.setting]:
        chosen = labels(SETTINGS[name].microbatches, not given.no_compile, given.only)
        report(console, name, step_times_ms(name, chosen, given.repetitions))


if __name__ == "__main__":
    main()

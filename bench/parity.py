"""Do unmodified models of transformers, trained over meshes, match the same module trained by plain torch in one process?

Small configurations of the zoo (four blocks, fp32, random weights, no dropout), routers with their balance loss: five steps
of AdamW, each on two microbatches of new rows. All losses, the gradients of the first step, and every parameter after the
last step, as `pipe.gather` returns it on every rank, are compared. The reference is the module itself in one process with
`backward` and `torch.optim.AdamW`, without autofunc; and the same module in fp64 shows the effect of rounding alone.

AdamW divides each gradient by its own magnitude. If a gradient is rounding noise, so is the direction of its step, unless
`eps` is larger than the noise: with torch's 1e-8 some elements with gradients that small differ by more than 1e-5, on a
mesh just as between fp32 and fp64 in one process.

Run: python bench/parity.py [--only PATTERN ...] [--eps 1e-8]     e.g. --only 'Llama*' --only '*cp2*'
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import math
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from machine import describe_machine
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from zoo_entry import BATCHES, IMAGE, Entry, build
from zoo_others import ENCODERS, PAIRS
from zoo_text import TEXT

import autofunc as af
from autofunc.mesh import data_coordinate
from autofunc.tree import flatten

STEPS, MICROBATCHES, TOLERANCE = 5, 2, 1e-5
SECONDS = 300  # that a rank waits for another
MODELS = ("GPT-2", "Llama", "Qwen3", "Gemma 3", "Phi-3", "Mixtral", "Qwen3-MoE", "OLMoE", "T5", "BERT")
ROUTED = ("Mixtral", "Qwen3-MoE", "OLMoE")
BOTH_ENGINES = ("GPT-2", "Llama", "Mixtral")
LEARNING_RATE, EPS = 1e-3, 1e-6


@dataclass(frozen=True)
class Mesh:
    """Sizes of its axes, and how it is used."""

    title: str
    axes: Mapping[str, int]
    sharding: Mapping[str, Any] = field(default_factory=dict)

    @property
    def processes(self) -> int:
        """The number of processes."""
        return math.prod(self.axes.values())


MESHES = (
    Mesh("tp2", {"tp": 2}),
    Mesh("tp2 derived", {"tp": 2}, {"tensor_parallel": "derived"}),
    Mesh("tp2 sequence", {"tp": 2}, {"sequence_parallel": True}),
    Mesh("cp2", {"cp": 2}),
    Mesh("pp2 x tp2", {"pp": 2, "tp": 2}),
    Mesh("pp2 x cp2 ring", {"pp": 2, "cp": 2}, {"context_parallel": "ring"}),
)
SPREAD = Mesh("ep2", {"dp_shard": 2}, {"expert_parallel": 2})
EIGHT = (Mesh("pp2 x dp2 x tp2", {"pp": 2, "dp_shard": 2, "tp": 2}), Mesh("pp2 x cp2 x tp2", {"pp": 2, "cp": 2, "tp": 2}))


@dataclass(frozen=True)
class Case:
    """A model on a mesh, with an engine."""

    model: str
    mesh: Mesh
    engine: str

    @property
    def title(self) -> str:
        """The text that `--only` matches."""
        return f"{self.model} {self.mesh.title} {self.engine}"


@dataclass(frozen=True)
class Verdict:
    """The largest differences of all ranks, or what went wrong."""

    case: Case
    seconds: float
    loss: float = math.nan  # largest relative difference of a loss
    gradient: float = math.nan  # of a gradient in the first step, over the largest of its parameter
    parameter: float = math.nan  # largest absolute difference after all steps
    worst: str = ""  # which parameter's that is
    gradient_there: float = math.nan  # of that element, in one process's first step
    rounding: float = math.nan  # largest absolute difference of a parameter between fp32 and fp64 in one process
    fits: bool = False
    error: str = ""

    @property
    def said(self) -> str:
        """The verdict as text."""
        if self.error:
            return f"FAIL {self.error}"
        far = f"loss {self.loss:.1e}, gradients {self.gradient:.1e}, parameters {self.parameter:.1e}"
        return f"PASS {far}" if self.fits else f"FAIL {far}, most of {self.worst}"


def cases() -> Iterator[Case]:
    """Return all cases."""
    for model in MODELS:
        meshes = (*MESHES, *([SPREAD] if model in ROUTED else []), *(EIGHT if model == "Llama" else []))
        for engine in ("graph", "eager") if model in BOTH_ENGINES else ("graph",):
            yield from (Case(model, mesh, engine) for mesh in meshes)


def entry_of(name: str) -> Entry:
    """Build the zoo's model of this name, routers with their balance loss."""
    entry = {**TEXT, **ENCODERS, **PAIRS}[name]
    extra = {"output_router_logits": True, "router_aux_loss_coef": 0.1} if name in ROUTED else {}
    return entry._replace(options={**entry.options, **extra})


def batch_of(entry: Entry, step: int) -> dict[str, Any]:
    """Return four rows, which differ in each step."""
    words = ("input_ids", "labels", "decoder_input_ids")
    made: dict[str, Any] = BATCHES[entry.batch]()
    return {name: (leaf - 3 + 7 * step) % (IMAGE - 3) + 3 if name in words else leaf for name, leaf in made.items()}


def microbatches(batch: Mapping[str, Tensor], places: int) -> Iterator[dict[str, Tensor]]:
    """Return the microbatches of one process: each has the rows of one microbatch of all data parallel ranks."""
    for number in range(MICROBATCHES):
        yield {
            name: torch.cat([part.chunk(MICROBATCHES)[number] for part in leaf.chunk(places)])
            for name, leaf in batch.items()
        }


def plain(name: str, places: int, eps: float, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Train in one process with plain torch."""
    entry = entry_of(name)
    module: Any = build(entry).to(dtype)
    if name in ROUTED:
        module.set_experts_implementation("eager")  # a loop over experts
    optimizer = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, eps=eps)
    losses, first = list[float](), dict[str, Tensor]()
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for rows in microbatches(batch_of(entry, step), places):
            loss = module(**rows).loss / MICROBATCHES
            loss.backward()
            total += loss.item()
        if not step:
            first = {path: leaf.grad.clone() for path, leaf in _parameters(module) if leaf.grad is not None}
        optimizer.step()
        losses.append(total)
    return {"losses": losses, "gradients": first, "parameters": {p: leaf.detach() for p, leaf in _parameters(module)}}


def _parameters(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module.named_parameters(remove_duplicate=False)


def expected_of(name: str, places: int, eps: float) -> dict[str, Any]:
    """Train in one process, and measure the distance to fp64."""
    found, exact = plain(name, places, eps), plain(name, places, eps, torch.float64)
    off = [(leaf - exact["parameters"][path]).abs().max().item() for path, leaf in found["parameters"].items()]
    return {**found, "rounding": max(off)}


@cache
def mesh_of(*axes: tuple[str, int]) -> DeviceMesh:
    """Return this process's mesh, shared by all cases on the same axes."""
    return af.make_mesh(**dict(axes), device_type="cpu")


def over(case: Case, eps: float) -> dict[str, Any]:
    """Train on this rank's part of the mesh."""
    entry, axes = entry_of(case.model), dict(case.mesh.axes)
    mesh = mesh_of(*axes.items())
    place, places = data_coordinate(mesh)
    model = af.from_module(build(entry), batch_of(entry, 0))
    s = af.schedule.build("1f1b", num_ranks=axes.get("pp", 1), num_microbatches=MICROBATCHES)
    pipe = af.pipeline(
        af.split(model, s.num_stages), s, mesh=mesh, engine=case.engine, sharding=af.Sharding(**case.mesh.sharding)
    )
    params, optimizer = pipe.init(), af.optimizer(torch.optim.AdamW, lr=LEARNING_RATE, eps=eps)
    state, losses, first = optimizer.init(params), list[float](), dict[str, Tensor]()
    for step in range(STEPS):
        own = {name: leaf.chunk(places)[place] for name, leaf in batch_of(entry, step).items()}
        loss, grads = af.value_and_grad(pipe)(params, own)
        if not step:
            first = {path: leaf.clone() for path, leaf in flatten(pipe.gather(grads)).items()}
        params, state = optimizer.update(grads, state, params)
        losses.append(loss.item())
    found = {path: leaf.clone() for path, leaf in flatten(pipe.gather(params)).items()}
    pipe.close()
    return {"losses": losses, "gradients": first, "parameters": found}


def compare(case: Case, found: Mapping[str, Any], expected: Mapping[str, Any], seconds: float) -> Verdict:
    """Return the largest differences on all ranks; every rank calls it."""
    losses, others = torch.tensor(found["losses"]), torch.tensor(expected["losses"])
    wanted, made = expected["parameters"], found["parameters"]
    missing = {path for path in wanted if path not in made} - _held_elsewhere(wanted, made)
    off = {path: (leaf - wanted[path]).abs() for path, leaf in made.items()}
    beyond = [(leaf > TOLERANCE * (1 + wanted[path].abs())).any() for path, leaf in off.items()]
    worst = max(off, key=lambda path: off[path].max().item())
    gradient = max(_relative(leaf, expected["gradients"].get(path)) for path, leaf in found["gradients"].items())
    numbers = torch.tensor(
        [((losses - others).abs() / others.abs()).max(), gradient, off[worst].max(), float(any(beyond) or bool(missing))],
        dtype=torch.float64,
    )
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    loss, gradient, parameter, wrong = numbers.tolist()
    there = expected["gradients"][worst].flatten()[off[worst].argmax()].abs().item()
    fits = not wrong and loss <= TOLERANCE
    return Verdict(
        case, seconds, loss, gradient, parameter, worst, there, expected["rounding"], fits,
        f"not gathered: {missing}" if missing else "",
    )  # fmt: skip


def _held_elsewhere(wanted: Mapping[str, Tensor], made: Mapping[str, Tensor]) -> set[str]:
    """Return names of tied parameters, which are gathered under another name."""
    kept = {wanted[path].data_ptr() for path in made if path in wanted}
    return {path for path, leaf in wanted.items() if path not in made and leaf.data_ptr() in kept}


def _relative(leaf: Tensor, expected: Tensor | None) -> float:
    if expected is None:
        return leaf.abs().max().item()
    return ((leaf - expected).abs().max() / expected.abs().max().clamp_min(1e-6)).item()


def work(rank: int, size: int, store: str, chosen: list[Case], known: dict[Any, Any], eps: float, results: str) -> None:
    """Run one of several processes; the first writes the results of all."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    limit = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=limit)
    verdicts = []
    for case in chosen:
        start, made, error = time.perf_counter(), dict[str, Any](), ""
        try:
            made = over(case, eps)
        except Exception as found:
            error = f"rank {rank}: {type(found).__name__}: {found}"
            print(case.title, error, flush=True)  # at once: others may wait for this one
        seconds, errors = time.perf_counter() - start, [""] * size
        dist.all_gather_object(errors, error)  # those of ranks that only waited for others come last
        if any(errors):
            said = sorted(filter(None, errors), key=lambda text: "PeerLost" in text)
            verdict = Verdict(case, seconds, error=said[0])
        else:
            verdict = compare(case, made, known[case.model, case.mesh.axes.get("dp_shard", 1)], seconds)
        verdicts.append(verdict)
        if rank == 0:
            print(f"{case.title}: {verdict.said} ({seconds:.1f} s)", flush=True)
    if rank == 0:
        torch.save(verdicts, results)
    dist.destroy_process_group()


def main() -> None:
    """Measure and print; exit with status 1 if a case fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="PATTERN", help="of titles, such as 'Llama pp2 x tp2 eager'")
    parser.add_argument("--eps", type=float, default=EPS, help="of AdamW (default: %(default)s; torch's is 1e-8)")
    arguments = parser.parse_args()
    patterns = arguments.only or ["*"]
    chosen = [case for case in cases() if any(fnmatch(case.title, pattern) for pattern in patterns)]
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    wanted = dict.fromkeys((case.model, case.mesh.axes.get("dp_shard", 1)) for case in chosen)
    known = {key: expected_of(*key, arguments.eps) for key in wanted}
    verdicts: list[Verdict] = []
    for size in sorted({case.mesh.processes for case in chosen}):
        with tempfile.TemporaryDirectory() as folder:
            store, results = (str(Path(folder) / name) for name in ("store", "results"))
            these = [case for case in chosen if case.mesh.processes == size]
            torch.multiprocessing.spawn(work, (size, store, these, known, arguments.eps, results), nprocs=size)
            verdicts += torch.load(results, weights_only=False)
    show(verdicts)
    raise SystemExit(not all(verdict.fits for verdict in verdicts))


def show(verdicts: list[Verdict]) -> None:
    """Format the table.

    Differences from one process: of losses, relative; of gradients, relative to the largest of a parameter; of parameters,
    absolute, with the gradient that the most different element has, and what rounding alone makes of parameters.
    """
    console = Console(width=170)
    console.print(describe_machine(), highlight=False)
    table = Table("model", "mesh", "engine", box=None, pad_edge=False)
    for title in ("loss", "gradients", "parameters", "gradient there", "fp32 / fp64", "s"):
        table.add_column(title, justify="right")
    table.add_column("")
    for each in sorted(verdicts, key=lambda each: (MODELS.index(each.case.model), each.case.engine != "graph")):
        case = each.case
        numbers = (
            f"{number:.1e}" for number in (each.loss, each.gradient, each.parameter, each.gradient_there, each.rounding)
        )
        said = "PASS" if each.fits else f"FAIL {each.error or each.worst}"
        table.add_row(case.model, case.mesh.title, case.engine, *numbers, f"{each.seconds:.1f}", escape(said))
    console.print(table, highlight=False)
    console.print(f"{sum(each.fits for each in verdicts)} of {len(verdicts)} within {TOLERANCE:g}", highlight=False)


if __name__ == "__main__":
    main()

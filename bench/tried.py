"""Try one module: capture it, split it, run it by two schedules, compare it with its own microbatch loop, and check it.

The loop is autograd on the module itself, dropout off. Loss and gradients must agree to 1e-6 of each tensor's largest
element, and equal the oracle's bit for bit; the module must be unchanged.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

import autofunc as af
from autofunc import tree
from autofunc.batch import split_batch
from autofunc.cache import shared
from autofunc.captured.without_dropout import still
from autofunc.errors import AutofuncError
from autofunc.losses import Loss, evaluate

TOLERANCE = 1e-6
OTHER_BITS = "right, but not the oracle's bits"
"""Behind a cut values are contiguous, and some kernels sum in a different order for different strides."""

MICROBATCHES = 2
LAYOUTS: tuple[tuple[Any, str], ...] = ((2, "1f1b"), (3, "zb_h1"))
"""(split points or number of stages, schedule)."""


@dataclass(frozen=True)
class Case:
    """A module to try.

    Args:
        module: with real weights, in the mode it is tried in.
        batch: four rows.
        loss: see `af.pipeline`.
        layouts: see `LAYOUTS`.
    """

    module: nn.Module
    batch: Mapping[str, Any]
    loss: Loss | None = None
    layouts: Sequence[tuple[Any, str]] = LAYOUTS


@dataclass
class Tried:
    """The outcome of trying a module."""

    name: str
    parameters: int = 0
    trained: int = 0
    seconds: float = 0.0  # to capture it
    layers: int = 0
    runs: dict[str, str] = field(default_factory=dict)  # "3 zb_h1" -> "" where it is right, else why not
    refused: str = ""  # why it was not captured
    check: str = ""  # "OK", or what failed; nothing where it was not asked
    notes: tuple[str, ...] = ()

    @property
    def right(self) -> bool:
        """True if it was captured, and every run agrees with the module to 1e-6."""
        return not self.refused and bool(self.runs) and not any(why and OTHER_BITS not in why for why in self.runs.values())


def try_module(name: str, build: Callable[[], Case], *, checks: bool) -> Tried:
    """Try one module; failures are part of the result.

    Args:
        name: of the row in the table.
        build: builds a fresh module, after the seed was set.
        checks: whether `af.check` looks at it too, which takes longer than all else.
    """
    torch.manual_seed(0)
    case = build()
    found = Tried(name, *_sizes(case.module))
    before = {key: leaf.clone() for key, leaf in case.module.state_dict().items()}
    shared.clear()
    began = time.perf_counter()
    try:
        model = af.from_module(case.module, case.batch)
        found.seconds = time.perf_counter() - began
        found.layers, found.notes = len(model.layers), model.notes
        own = _own_loop(case)
        for points, schedule in case.layouts:
            found.runs[f"{points} {schedule}"] = _run(model, case, points, schedule, own)
    except Exception as error:  # a row of the table, whatever it is
        found.refused = _words(error)
    after = case.module.state_dict()
    if changed := [key for key, leaf in before.items() if not torch.equal(leaf, after[key])]:
        found.runs["afterwards"] = f"the module's {changed[0]!r} is another"
    if not checks:
        return found
    report = af.check(case.module, case.batch, loss=case.loss)
    failed = [f"{verdict.code}: {verdict.message}" for verdict in report.verdicts if verdict.status == "fail"]
    found.check = "; ".join(failed) or "OK"
    return found


class Own(NamedTuple):
    """Results of the module's own loop."""

    loss: Tensor
    grads: dict[str, Tensor]
    buffers: dict[str, Tensor]  # as the loop leaves them


def _run(model: af.Model, case: Case, points: Any, schedule: str, own: Own) -> str:
    """Explain how a run differs from the module; empty if it agrees."""
    try:
        stages = af.split(model, points)
        s = af.schedule.build(schedule, num_ranks=len(stages), num_microbatches=MICROBATCHES)
        given = {"params": model.init(), "batch": case.batch, "state": model.init_state()}
        (loss, state), grads = af.value_and_grad(af.pipeline(stages, s, loss=case.loss), has_state=True)(**given)
        oracle = af.reference_value_and_grad(stages[0].model, case.loss, MICROBATCHES, has_state=True)(**given)
    except Exception as error:  # a row of the table, whatever it is
        return _words(error)
    expected_loss, expected, buffers = own
    if abs(float(loss - expected_loss)) > TOLERANCE * abs(float(expected_loss)):
        return f"the loss is {float(loss):.8g}, not {float(expected_loss):.8g}"
    found, bits, kept = tree.flatten(grads), tree.flatten(oracle[1]), tree.flatten(state)
    if found.keys() != expected.keys():
        return f"gradients of other parameters: {sorted(found.keys() ^ expected.keys())[:3]}"
    off = {path: _off(found[path], leaf) for path, leaf in expected.items()}
    path = max(off, key=off.__getitem__)
    if off[path] > TOLERANCE:
        return f"the gradient of {path!r} is off by {off[path]:.1e}"
    other = [path for path, leaf in kept.items() if _off(leaf.double(), buffers[path].double()) > TOLERANCE]
    if other:
        return f"the new state {other[0]!r} is another"
    same = torch.equal(loss, oracle[0][0]) and all(torch.equal(leaf, bits[path]) for path, leaf in found.items())
    return "" if same else f"{OTHER_BITS}, largest difference {off[path]:.0e}"


def _own_loop(case: Case) -> Own:
    """Return a module's loss, gradients and buffers by autograd, one microbatch after the other, leaving it unchanged."""
    before = {name: leaf.clone() for name, leaf in case.module.named_buffers()}
    named = {name: leaf for name, leaf in case.module.named_parameters() if leaf.requires_grad}
    sums = {name: torch.zeros_like(leaf) for name, leaf in named.items()}
    total, weight = torch.zeros(()), torch.zeros(())
    takes = _takes(case)
    for microbatch in split_batch(case.batch, MICROBATCHES):
        with still(case.module), torch.compiler.set_stance("force_eager"):
            terms = evaluate(case.loss, case.module(**{name: microbatch[name] for name in takes}), microbatch)
            grads = torch.autograd.grad(terms.sum, list(named.values()), allow_unused=True)
        for name, grad in zip(named, grads, strict=True):
            if grad is not None:
                sums[name] = sums[name] + grad
        total, weight = total + terms.sum.detach(), weight + terms.weight
    buffers = {name: leaf.clone() for name, leaf in case.module.named_buffers()}
    with torch.no_grad():
        for name, leaf in case.module.named_buffers():
            leaf.copy_(before[name])
    return Own(total / weight, {name: grad / weight for name, grad in sums.items()}, buffers)


def _takes(case: Case) -> list[str]:
    """Return the batch entries for the module; the loss reads its own entry, `target`."""
    return [name for name in case.batch if name != "target"]


def _off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-3)) if expected.numel() else 0.0


def _sizes(module: nn.Module) -> tuple[int, int]:
    leaves = list(module.parameters())
    return sum(leaf.numel() for leaf in leaves), sum(leaf.numel() for leaf in leaves if leaf.requires_grad)


def _words(error: Exception) -> str:
    kind = "" if isinstance(error, AutofuncError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:300]


def table(rows: Iterable[Tried]) -> str:
    """Format the outcomes as Markdown: one line each, then explanations of failures."""
    rows = list(rows)
    lines = ["| model | parameters | trained | layers | capture | runs | `af.check` |", "|---|--:|--:|--:|--:|---|---|"]
    for row in rows:
        runs = "refused" if row.refused else "right" if row.right else "wrong"
        failed = re.findall(r"(?:^|; )([CP]\d): ", row.check)
        verdict = ", ".join(dict.fromkeys(failed)) or row.check
        sizes = f"{row.parameters:,} | {row.trained:,} | {row.layers}"
        lines.append(f"| {row.name} | {sizes} | {row.seconds:.1f} s | {runs} | {verdict} |")
    right = sum(row.right for row in rows)
    lines += ["", f"{right} of {len(rows)} give their own loss and gradients."]
    for row in rows:
        problems = [row.refused, *(f"{run}: {why}" for run, why in row.runs.items() if why)]
        if row.check not in ("", "OK"):
            problems.append(f"`af.check`: {row.check}")
        lines += [f"- {row.name}: {problem}" for problem in problems if problem]
        lines += [f"- {row.name}, a note: {note}" for note in row.notes]
    return "\n".join(lines)


def try_all(builds: Mapping[str, Callable[[], Case]], names: Sequence[str], *, checks: bool) -> list[Tried]:
    """Try the named modules, or all if no names are given, printing progress."""
    console, rows = Console(stderr=True), []
    for name in names or builds:
        began = time.perf_counter()
        row = try_module(name, builds[name], checks=checks)
        rows.append(row)
        state = "right" if row.right else f"NOT right: {row.refused or row.runs}"
        alarm = "" if row.check in ("", "OK") else f"; check says {row.check}"
        console.print(f"{name}: {state}{alarm} ({time.perf_counter() - began:.0f} s)", markup=False, soft_wrap=True)
    return rows

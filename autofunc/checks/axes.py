"""P7: axes that cut the layers themselves: heads and features over tp ranks, tokens over cp ranks, experts over ep ranks.

This needs no processes: ranks are imagined, and layers run on fake tensors. An axis that was not asked for fails nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from autofunc.checks.subject import Subject
from autofunc.checks.verdict import Verdict
from autofunc.context_parallel.axis import imagined_axis
from autofunc.errors import AutofuncError
from autofunc.model import Model
from autofunc.shard import Sharding
from autofunc.shard.cut_over_tp import cut_over_tp
from autofunc.shard.experts import check_experts
from autofunc.splitting import Setting, infer_boundaries, split

AXES = ("tp", "cp", "ep")
_SIZES = (2, 4, 8)
_MOST_EXPERTS = 64  # largest number of ranks tried for sharing experts

Result = TypeVar("Result")


@dataclass(frozen=True)
class _Outcome:
    """Sizes of an axis that work, with a note on the first; or why the first does not."""

    sizes: tuple[int, ...] = ()
    note: str = ""
    problem: str = ""


def check_axes(subject: Subject, asked: Mapping[str, int], sharding: Sharding) -> list[Verdict]:
    """Return the findings of P7, one per axis.

    Args:
        subject: the checked module or model.
        asked: sizes of axes that a run would have; an axis that is missing, or of size 1, is not needed.
        sharding: that run's choices.
    """
    model, _ = subject.captured
    if model is None:
        return [Verdict("P7", "skip", "it cannot be captured, see P1")]
    return [_verdict(subject, axis, asked, _outcome(subject, model, axis, asked, sharding)) for axis in AXES]


def _verdict(subject: Subject, axis: str, asked: Mapping[str, int], outcome: _Outcome) -> Verdict:
    wanted = asked.get(axis, 1) > 1
    data = {"axis": axis, "sizes": list(outcome.sizes), "asked": asked.get(axis, 1)}
    if outcome.problem:
        text = f"{axis}: no: {outcome.problem}"
        return Verdict("P7", "fail" if wanted else "skip", text, subject.where if wanted else None, data)
    sizes = ", ".join(map(str, outcome.sizes))
    return Verdict("P7", "pass", f"{axis}: yes, at {sizes}{outcome.note}", data=data)


def _outcome(subject: Subject, model: Model, axis: str, asked: Mapping[str, int], sharding: Sharding) -> _Outcome:
    wanted = asked.get(axis, 1)
    try:
        if wanted > 1:
            _refuse_together(axis, asked)
        return _CUTS[axis](subject, model, (wanted,) if wanted > 1 else (), sharding)
    except AutofuncError as error:
        return _Outcome(problem=str(error))


def _refuse_together(axis: str, asked: Mapping[str, int]) -> None:
    others = [each for each in ("tp", "cp") if asked.get(each, 1) > 1]
    if axis == "ep" and others:
        raise AutofuncError(f"experts cannot be spread along with {' and '.join(others)} yet; use ep=1, or {others[0]}=1")


def _over_tp(subject: Subject, model: Model, asked: tuple[int, ...], sharding: Sharding) -> _Outcome:
    found = _working(asked or _SIZES, lambda size: cut_over_tp(model, size, sharding))
    first = found[0][1]
    if first.over is None:
        return _Outcome(tuple(size for size, _ in found), ", by its placement table")
    notes = "".join(f"; {note}" for note in first.over.notes)
    return _Outcome(tuple(size for size, _ in found), f", by {first.over.source}{notes}")


def _over_cp(subject: Subject, model: Model, asked: tuple[int, ...], sharding: Sharding) -> _Outcome:
    batch = {model.key_name: None, **model.with_needed_key(subject.batch)}
    has_loss = subject.first.error == "" and subject.terms(subject.first.outputs, subject.batch) is not None

    def trace(size: int) -> None:
        setting = Setting(context=imagined_axis(size, sharding.context_parallel))
        infer_boundaries(split(model), {}, batch, subject.loss, with_loss=has_loss, setting=setting)

    sizes = tuple(size for size, _ in _working(asked or _SIZES[:1], trace))
    return _Outcome(sizes, ", for sequences of a multiple of 2 * cp tokens")


def _over_ep(subject: Subject, model: Model, asked: tuple[int, ...], sharding: Sharding) -> _Outcome:
    paths = model.expert_paths
    if not asked and not paths:
        return _Outcome(problem="the model has no routed experts whose parameters are known")
    found = _working(asked or range(2, _MOST_EXPERTS + 1), lambda size: check_experts(model, size, size))
    sizes = tuple(size for size, _ in found)
    count = model.spec[min(paths)].shape[0]
    return _Outcome(sizes, f", sharing {count} experts per layer")


def _working(sizes: Iterable[int], cut: Callable[[int], Result]) -> list[tuple[int, Result]]:
    """Return the sizes for which the model can be cut, with each result of `cut`.

    Raises:
        AutofuncError: if no size works: the first size's error.
    """
    found, problems = list[tuple[int, Result]](), list[AutofuncError]()
    for size in sizes:
        try:
            found.append((size, cut(size)))
        except AutofuncError as error:
            problems.append(error)
    if not found:
        raise problems[0]
    return found


_CUTS = {"tp": _over_tp, "cp": _over_cp, "ep": _over_ep}

"""C4: one forward leaves nothing behind for the next.

Several microbatches are in flight at a time, and a layer may be rerun for its gradient: whatever one call keeps in the
module, another finds there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autofunc import tree
from autofunc.captured.snapshot import Change
from autofunc.checks.subject import ForwardError, Subject
from autofunc.checks.verdict import Verdict, where
from autofunc.errors import some_of
from autofunc.whole_module import close

_DEEPEST = 4  # levels of objects inside an argument that are searched


def check_leftovers(subject: Subject) -> list[Verdict]:
    """Return the findings of C4."""
    if subject.module is None:
        return [Verdict("C4", "skip", "layers are functions, and keep nothing")]
    changes = [change for change in subject.first.changes if change.kind != "parameter"]
    captured, _ = subject.captured  # once captured, no forward reads what another stored: it is undone
    states = captured.state_spec if captured is not None else {}
    kept = [
        change
        for change in changes
        if change.how != "noted"
        and not (captured and change.kind == "attribute")
        and tree.join(change.module, change.attribute) not in states
    ]
    if kept:
        return [_kept(subject, module, named) for module, named in _by_class(subject, kept).items()]
    if states:
        return [Verdict("C4", "pass", f"keeps state, which steps take and return (has_state=True): {some_of(states)}")]
    if len(changes) < len(subject.first.changes):
        return [Verdict("C4", "skip", "forward changes parameters (see C2), so no two runs are alike")]
    for problem in (_runs_differ, _order_matters, _checkpoints_differ):
        try:
            text, at = problem(subject)
        except (RuntimeError, ForwardError) as error:
            text, at = f"{_WHAT[problem]}: {str(error).strip().splitlines()[0]}", ""
        finally:
            subject.restore()
        if text:
            return [Verdict("C4", "fail", text, subject.where_above(at))]
    noted = [change for change in changes if change.how == "noted"]
    found = [
        _noted(subject, module, named, undone=captured is not None) for module, named in _by_class(subject, noted).items()
    ]
    return found or [
        Verdict("C4", "pass", "forwards leave nothing behind, may overlap, and may be rerun for their gradients")
    ]


def _by_class(subject: Subject, changes: list[Change]) -> dict[str, list[Change]]:
    """Group the changes by module, keeping only the first module of each class per attribute."""
    assert subject.module is not None
    first: dict[tuple[type, str], str] = {}
    found: dict[str, list[Change]] = {}
    for change in changes:
        cls = type(subject.module.get_submodule(change.module))
        at = first.setdefault((cls, change.attribute), change.module)
        if at == change.module:
            found.setdefault(at, []).append(change)
    return found


def _kept(subject: Subject, module: str, changes: list[Change]) -> Verdict:
    assert subject.module is not None
    part = subject.module.get_submodule(module)
    names = ", ".join(change.attribute for change in changes)
    if all(change.kind == "buffer" for change in changes):
        text = f"forward changes the buffers {names}; return them, or compute them in __init__"
    else:
        text = f"forward stores {names} in the module; return it, or compute it in __init__"
    return Verdict("C4", "fail", text, where(type(part), module))


def _noted(subject: Subject, module: str, changes: list[Change], *, undone: bool) -> Verdict:
    names = ", ".join(change.attribute for change in changes)
    if undone:
        text = f"forward sets a plain value inside {names}, which is put back after the capture"
        return Verdict("C4", "pass", text, subject.where_of(module))
    text = f"forward sets a plain value inside {names}, in a pipeline maybe on one rank only; set it before"
    return Verdict("C4", "warn", text, subject.where_of(module))


Finding = tuple[str, str]
"""The problem, and the module it was found in; both empty if there is none."""


def _runs_differ(subject: Subject) -> Finding:
    outputs = [subject.first.outputs, subject.run(subject.batch)]
    leaves = [[leaf for leaf in tree.leaves_and_spec(each)[0] if isinstance(leaf, Tensor)] for each in outputs]
    if len(leaves[0]) == len(leaves[1]) and all(map(close, *leaves)):
        return "", ""
    return "two forwards in a row, with the same random numbers, differ: something outside the module keeps state", ""


def _order_matters(subject: Subject) -> Finding:
    parts = (subject.parts() * 2)[:2]
    try:
        expected = [subject.gradients(subject.run(part, seed=seed), part) for seed, part in enumerate(parts)]
    except ForwardError:  # P3 reports it
        return "", ""
    subject.restore()
    outputs = [subject.run(part, seed=seed) for seed, part in enumerate(parts)]
    found = [subject.gradients(output, part) for output, part in zip(outputs, parts, strict=True)]
    return _differing(expected, found, "gradients change if the next microbatch's forward runs before the backward")


def _checkpoints_differ(subject: Subject) -> Finding:
    parts = {id(part): part for part in map(_submodule(subject), subject.layers)}.values()
    writing: set[nn.Module] = set()
    with _replaced(parts, lambda part: partial(_noting_writes, part, part.forward, writing)):
        expected = subject.gradients(subject.run(subject.batch), subject.batch)
    subject.restore()
    again = [part for part in parts if part not in writing]  # the others would be rerun on inputs they have changed
    with _replaced(again, lambda part: partial(checkpoint, part.forward, use_reentrant=False)):
        found = subject.gradients(subject.run(subject.batch), subject.batch)
    return _differing([expected], [found], "gradients change if layers are rerun for them (checkpointing)")


_WHAT: Mapping[Callable[[Subject], Finding], str] = {
    _runs_differ: "forward cannot run twice",
    _order_matters: "forward cannot run for one microbatch before the backward of another",
    _checkpoints_differ: "layers cannot be rerun for their gradients (checkpointing)",
}


def _differing(expected: list[dict[str, Tensor]], found: list[dict[str, Tensor]], what: str) -> Finding:
    for one, other in zip(expected, found, strict=True):
        for name in {**one, **other}:
            if name not in one or name not in other or not close(one[name], other[name]):
                return f"{what}: first that of {name!r}", name.rpartition(".")[0]
    return "", ""


def _tensors_in(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """Yield an argument's tensors, including those held by nested objects that are not modules."""
    for leaf in tree.leaves_and_spec(value)[0]:
        if isinstance(leaf, Tensor):
            yield leaf
        elif depth < _DEEPEST and not isinstance(leaf, (nn.Module, type)):
            yield from _tensors_in(getattr(leaf, "__dict__", {}), depth + 1)


def _submodule(subject: Subject) -> Callable[[str], nn.Module]:
    assert subject.module is not None
    return subject.module.get_submodule


def _noting_writes(part: nn.Module, forward: Callable[..., Any], writing: set[nn.Module], *args: Any, **kwargs: Any) -> Any:
    """Call a forward, and note the part if it changes its arguments: a tensor in place, or the tensors of an object.

    `nn.ReLU(inplace=True)` does the former, attention with a cache of keys and values the latter.
    """
    given = list(_tensors_in((args, kwargs)))
    versions = [leaf._version for leaf in given]
    outputs = forward(*args, **kwargs)
    now = list(_tensors_in((args, kwargs)))
    same = len(now) == len(given) and all(one is other for one, other in zip(now, given, strict=True))
    if not same or versions != [leaf._version for leaf in given]:
        writing.add(part)
    return outputs


@contextmanager
def _replaced(parts: Iterable[nn.Module], forward_of: Callable[[nn.Module], Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward of some parts temporarily; the objects stay the same."""
    before: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for part in parts:
        space = vars(part)
        before.append((space, {"forward": space["forward"]} if "forward" in space else {}))
        space["forward"] = forward_of(part)
    try:
        yield
    finally:
        for space, forward in before:
            del space["forward"]
            space.update(forward)

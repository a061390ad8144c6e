"""Outputs and losses of a batch at once, and in microbatches, without dropout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from autofunc import tree
from autofunc.checks.subject import Run, Subject
from autofunc.losses import IGNORED
from autofunc.whole_module import close

LossKind = Literal["none", "equal", "tokens", "sum", "coupled"]
"""How the mean of the microbatches' losses relates to the loss of the batch: equal to it; both are means over labels, whose
number differs between microbatches; both are sums; or it depends on more than that."""


@dataclass(frozen=True)
class WholeAndParts:
    """A batch, and its microbatches."""

    whole: Run
    parts: Sequence[Run]


def run_whole_and_parts(subject: Subject, batch: Mapping[str, Any] | None = None) -> WholeAndParts:
    """Run a batch and its microbatches; by default the subject's own, which run once and are remembered.

    Raises:
        ForwardError: if a forward fails.
    """
    whole, *parts = subject.still if batch is None else map(subject.run_still, (batch, *subject.parts(batch)))
    return WholeAndParts(whole, parts)


def loss_kind(both: WholeAndParts) -> LossKind:
    """See `LossKind`."""
    terms = [run.terms for run in both.parts]
    whole = both.whole.terms
    if whole is None or any(each is None for each in terms):
        return "none"
    sums = torch.stack([each.sum.detach().float() for each in terms if each is not None])
    weights = torch.stack([each.weight for each in terms if each is not None])
    expected = whole.sum.detach().float()
    if close(sums.sum() / weights.sum(), expected / whole.weight):
        return "equal"
    if len(set(weights.tolist())) == 1 and float(whole.weight) == float(weights[0]):  # plain means
        if close(sums.sum(), expected):
            return "sum"
        for counts in _label_counts(both.parts):
            if close((sums * counts).sum() / counts.sum(), expected):
                return "tokens"
    return "coupled"


def labels_of(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the batch entries that hold integer labels."""
    return {
        name: value
        for name, value in batch.items()
        if isinstance(value, Tensor)
        and value.dtype == torch.int64
        and value.dim() > 0
        and any(word in name.lower() for word in ("label", "target"))
    }


def _label_counts(parts: Sequence[Run]) -> Iterator[Tensor]:
    """Yield the label counts of the microbatches, with and without each row's first, which models that shift leave out."""
    for name in labels_of(parts[0].batch):
        for begin in (0, 1):
            counts = [(part.batch[name][..., begin:] != IGNORED).sum() for part in parts]
            if any(counts):
                yield torch.stack(counts).float()


def compared(whole: Any, parts: Sequence[Any]) -> dict[str, Literal["rows", "same", "reduced", "differs", "other"]]:
    """Relate each tensor of an output to those of the microbatches.

    Returns:
        By name: "rows": their concatenation; "same": equal to each of them; "reduced": their mean or sum; "differs": it
        has rows, with other values; "other": it has no rows, and other values.
    """
    names, leaves = tree.leaf_names(whole, "output"), tree.leaves_and_spec(whole)[0]
    columns = [tree.leaves_and_spec(part)[0] for part in parts]
    found: dict[str, Any] = {}
    if any(len(column) != len(leaves) for column in columns):
        return {"output": "differs"}
    for name, leaf, *parts in zip(names, leaves, *columns, strict=True):
        if isinstance(leaf, Tensor) and all(isinstance(part, Tensor) for part in parts):
            found[name] = _composed(leaf, parts)
    return found


def _composed(whole: Tensor, parts: Sequence[Tensor]) -> str:
    if whole.dim() > 0 and all(part.dim() == whole.dim() for part in parts):
        for dim in range(whole.dim()):
            others = [[*part.shape[:dim], *part.shape[dim + 1 :]] for part in parts]
            fits = all(other == [*whole.shape[:dim], *whole.shape[dim + 1 :]] for other in others)
            if fits and sum(part.shape[dim] for part in parts) == whole.shape[dim]:
                return "rows" if close(torch.cat(list(parts), dim), whole) else "differs"
    if any(part.shape != whole.shape for part in parts):
        return "differs"
    if all(close(part, whole) for part in parts):
        return "same"
    total = torch.stack([part.detach() for part in parts]).sum(0) if whole.is_floating_point() else whole
    if whole.is_floating_point() and (close(total, whole) or close(total / len(parts), whole)):
        return "reduced"
    return "other"


def first_coupled(subject: Subject) -> str | None:
    """Return the first module whose output for the batch does not combine those for the microbatches, or None."""
    whole = _outputs(subject, subject.batch)
    parts = [_outputs(subject, part) for part in subject.parts()]
    for position, (name, output) in enumerate(whole):
        calls = [part[position] for part in parts if len(part) == len(whole) and part[position][0] == name]
        if len(calls) == len(parts) and "differs" in compared(output, [output for _, output in calls]).values():
            return name
    return None


def _outputs(subject: Subject, batch: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return each module's output, in the order in which modules end."""
    assert subject.module is not None
    names = {id(part): name for name, part in subject.module.named_modules()}
    found: list[tuple[str, Any]] = []

    def keep(part: nn.Module, args: Any, output: Any) -> None:
        if id(part) in names:
            found.append((names[id(part)], tree.map_leaves(_kept, output)))

    with _hook(keep):
        subject.run_still(batch)
    return found


def _kept(leaf: Any) -> Any:
    """Copy a tensor: modules may write to it later."""
    return leaf.detach().clone() if isinstance(leaf, Tensor) else None


@contextmanager
def _hook(function: Any) -> Iterator[None]:
    handle = register_module_forward_hook(function)
    try:
        yield
    finally:
        handle.remove()

"""P3: a batch gives the same results as its microbatches put together: rows do not depend on one another."""

from __future__ import annotations

from torch import Tensor, nn

from autofunc import tree
from autofunc.checks.subject import ForwardError, Subject
from autofunc.checks.verdict import Verdict
from autofunc.checks.whole_and_parts import WholeAndParts, compared, first_coupled, loss_kind, run_whole_and_parts
from autofunc.whole_module import close

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_LOSS = ("output", "output.loss")


def check_independence(subject: Subject) -> list[Verdict]:
    """Return the findings of P3."""
    if len(subject.parts()) < 2:
        return [Verdict("P3", "skip", f"needs a batch that can be cut into microbatches; this one has {subject.rows} rows")]
    try:
        both = run_whole_and_parts(subject)
    except ForwardError as error:
        text = f"runs on the batch of {subject.rows} rows, but not on a part of it: {error}"
        return [Verdict("P3", "fail", text, subject.where)]
    if _draws(subject, both):
        return [Verdict("P3", "skip", "forward draws random numbers other than dropout, so runs cannot be compared")]
    found = compared(both.whole.outputs, [part.outputs for part in both.parts])
    rest = {name: how for name, how in found.items() if not (name in _LOSS and how in ("reduced", "same", "other"))}
    differs = [name for name, how in rest.items() if how == "differs"]
    if differs:
        return [_coupled(subject, f"{', '.join(differs[:4])} of a row depends on the other rows of its batch")]
    if loss_kind(both) == "coupled":
        if "rows" not in rest.values():
            return [_coupled(subject, "the loss of the batch is not a combination of its microbatches' losses")]
        text = (
            "the loss depends on which rows share a microbatch, though the other outputs do not: a loss that compares rows "
            "with each other changes, an auxiliary loss (load balancing) is taken per microbatch"
        )
        return [Verdict("P3", "warn", text, subject.where)]
    whole = [name for name, how in rest.items() if how == "other"]
    if whole:
        text = f"{', '.join(whole[:4])} has no rows and depends on which rows share a microbatch"
        return [Verdict("P3", "warn", text, subject.where)]
    return [Verdict("P3", "pass", f"the batch and its {len(both.parts)} microbatches give the same results")]


def _coupled(subject: Subject, text: str) -> Verdict:
    """Return the verdict, at the first module whose rows depend on each other."""
    module = first_coupled(subject) if subject.module is not None else None
    at = subject.where_of(module) if module else subject.where
    if module and subject.module is not None and isinstance(subject.module.get_submodule(module), _NORMS):
        return Verdict("P3", "warn", f"{text}: each microbatch is normalised separately", at)
    advice = "normalise or compare within a row, not over dim 0"
    return Verdict("P3", "fail", f"{text}; {advice}", at)


def _draws(subject: Subject, both: WholeAndParts) -> bool:
    """Return whether the seed changes the outputs even without dropout."""
    runs = [both.whole.outputs, subject.run(subject.batch, seed=1, mode=subject.stillness())]
    leaves = [[leaf for leaf in tree.leaves_and_spec(run)[0] if isinstance(leaf, Tensor)] for run in runs]
    return len(leaves[0]) != len(leaves[1]) or not all(map(close, *leaves))

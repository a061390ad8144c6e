"""P6: captured and cut, the module gives its own loss and gradients."""

from __future__ import annotations

from autofunc.captured import CapturedModel
from autofunc.checks.subject import Subject
from autofunc.checks.verdict import Verdict
from autofunc.errors import AutofuncError
from autofunc.whole_module import NotComparable, differences


def check_whole_module(subject: Subject) -> list[Verdict]:
    """The findings of P6: one verdict or more."""
    model, _ = subject.captured
    if not isinstance(model, CapturedModel):
        return [Verdict("P6", "skip", "compares a captured module with itself, and there is none, see P1")]
    try:
        found = differences(model, subject.batch, subject.loss)
    except NotComparable as error:
        return [Verdict("P6", "skip", str(error), subject.where)]
    except AutofuncError as error:
        return [Verdict("P6", "fail", str(error), subject.where)]
    if found:
        return [Verdict("P6", "fail", f"captured, it is not what it was: {'; '.join(found[:3])}", subject.where)]
    return [Verdict("P6", "pass", "captured and cut, loss and gradients are its own")]

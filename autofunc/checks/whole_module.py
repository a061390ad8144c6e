"""P6: captured and cut, the module gives the same loss and gradients as before."""

from __future__ import annotations

from autofunc.captured import CapturedModel
from autofunc.checks.subject import Subject
from autofunc.checks.verdict import Verdict
from autofunc.errors import AutofuncError
from autofunc.whole_module import NotComparable, differences


def check_whole_module(subject: Subject) -> list[Verdict]:
    """Return the findings of P6."""
    model, _ = subject.captured
    if not isinstance(model, CapturedModel):
        return [Verdict("P6", "skip", "compares the module with its capture, which failed, see P1")]
    try:
        found = differences(model, subject.batch, subject.loss)
    except NotComparable as error:
        return [Verdict("P6", "skip", str(error), subject.where)]
    except AutofuncError as error:
        return [Verdict("P6", "fail", str(error), subject.where)]
    if found:
        return [Verdict("P6", "fail", f"the captured module differs: {'; '.join(found[:3])}", subject.where)]
    return [Verdict("P6", "pass", "captured and cut, it gives the module's own loss and gradients")]

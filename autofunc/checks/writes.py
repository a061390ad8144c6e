"""C2: forward writes to no parameter, neither under no_grad nor through `.data`.

A sharded parameter is gathered into memory that is freed afterwards, so writes to it are lost.
"""

from __future__ import annotations

from autofunc import tree
from autofunc.checks.subject import Subject
from autofunc.checks.verdict import Verdict
from autofunc.checks.watch import Watched, watching


def check_writes(subject: Subject) -> list[Verdict]:
    """Return the findings of C2."""
    if subject.module is None:
        return [Verdict("C2", "skip", "layers are functions: engines refuse them if they write to parameters")]
    first = subject.first
    changed = {tree.join(change.module, change.attribute): change for change in first.changes if change.kind == "parameter"}
    writes = dict(first.watched.writes)
    if changed.keys() - writes.keys():
        writes = {**_thorough(subject).writes, **writes}
    verdicts = []
    for name, write in writes.items():
        text = f"forward writes to the parameter {name!r} ({write.operator}; {write.line}); compute a new tensor"
        verdicts.append(Verdict("C2", "fail", text, subject.where_of(write.module)))
    for name, change in changed.items():
        if name not in writes:
            how = "forward replaces" if change.how == "set" else "something outside of torch's operators writes to"
            text = f"{how} the parameter {name!r}; compute a new tensor"
            verdicts.append(Verdict("C2", "fail", text, subject.where_above(change.module)))
    return verdicts or [Verdict("C2", "pass", "forward leaves all parameters unchanged")]


def _thorough(subject: Subject) -> Watched:
    """Run again, comparing values around every operator."""
    assert subject.module is not None
    seen = watching(subject.module, thorough=True)
    try:
        with seen as watched:
            subject.run(subject.batch)
    finally:
        subject.restore()
    return watched

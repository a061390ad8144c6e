"""P2: parameters that several layers share; a pipeline keeps a copy on each stage using them, and sums their gradients."""

from __future__ import annotations

from autofunc.captured.snapshot import storage_of
from autofunc.checks.subject import Subject
from autofunc.checks.verdict import Verdict


def check_ties(subject: Subject) -> list[Verdict]:
    """Return the findings of P2."""
    by_memory: dict[int, list[str]] = {}
    for name, leaf in subject.params.items():
        storage = storage_of(leaf)
        if storage is not None:
            by_memory.setdefault(storage, []).append(name)
    found = [
        Verdict(
            "P2", "warn",
            f"{' and '.join(repr(name) for name in names)} are different parameters in the same memory, which they will "
            "not share once they are moved or sharded; assign the same nn.Parameter to both",
            subject.where,
        )
        for names in by_memory.values()
        if len(names) > 1
    ]  # fmt: skip
    groups = [[canonical, *aliases] for canonical, aliases in _aliases(subject).items()]
    if not groups:
        return found or [Verdict("P2", "pass", "no parameter is shared by layers")]
    text = "; ".join(" = ".join(group) for group in groups[:3]) + (f"; {len(groups) - 3} more" if len(groups) > 3 else "")
    return [*found, Verdict("P2", "pass", f"tied, kept once: {text}", data={"ties": groups})]


def _aliases(subject: Subject) -> dict[str, list[str]]:
    """Map a canonical name to its aliases: those in the module, and those of layers that read it elsewhere."""
    found: dict[str, list[str]] = {}
    if subject.module is not None:
        first = {id(leaf): name for name, leaf in subject.params.items()}
        for name, leaf in subject.module.named_parameters(remove_duplicate=False):
            if first[id(leaf)] != name:
                found.setdefault(first[id(leaf)], []).append(name)
    model, _ = subject.captured
    for alias, canonical in model.ties.items() if model is not None else ():
        if alias not in found.setdefault(canonical, []):
            found[canonical].append(alias)
    return found

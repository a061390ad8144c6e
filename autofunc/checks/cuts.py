"""P1: the module can be captured and cut, the same way each time; where, and what crosses there."""

from __future__ import annotations

from typing import Any

import torch

from autofunc.captured.branches import DECIDES
from autofunc.checks.subject import Subject
from autofunc.checks.verdict import Verdict
from autofunc.errors import AutofuncError
from autofunc.model import Model
from autofunc.splitting import infer_boundaries, split


def check_cuts(subject: Subject) -> list[Verdict]:
    """Return the findings of P1."""
    if subject.module is None and subject.first.draws:  # for a module, the capture finds out whether they matter
        drawn = " and ".join(subject.first.draws)
        text = f"forward draws from {drawn}, so calls run differently; draw before, and pass the numbers in the batch"
        return [Verdict("P1", "fail", text, subject.where)]
    model, problem = subject.captured
    if model is None:
        return [Verdict("P1", "fail", problem, subject.where)]
    try:
        points = _points(subject, model)
    except AutofuncError as error:
        return [Verdict("P1", "fail", str(error), subject.where)]
    if not points:
        refused = [f"{name!r} {why}" for name, why in model.specialise().cut_points.refused.items()]
        reason = f": {'; '.join(refused[:3])}" if refused else ""
        text = f"no second stage can begin anywhere{reason}. Cutting takes two parts with weights, one after the other"
        return [Verdict("P1", "fail", text, subject.where)]
    problem = _part_that_diverges(subject, model)
    if problem:
        return [Verdict("P1", "fail", f"on a part of the batch: {problem}", subject.where)]
    least = min(points, key=lambda point: int(point["bytes"]))
    text = (
        f"can be cut at {len(points)} places; least crosses at {least['names'][0]!r}: {least['bytes']:,} bytes for "
        f"{subject.rows} rows{''.join(f'; {note}' for note in getattr(model, 'notes', ()))}"
    )
    return [Verdict("P1", "pass", text, data={"split_points": points})]


def _part_that_diverges(subject: Subject, model: Model) -> str:
    """Return why a microbatch would stop a forward that branches on data; empty if all follow the captured branch."""
    if not any(note.startswith(DECIDES) for note in getattr(model, "notes", ())):
        return ""
    try:
        with torch.no_grad():
            for part in subject.parts():
                model(subject.params, {name: entry for name, entry in part.items() if name != subject.key_name})
    except AutofuncError as error:
        return str(error)
    return ""


def _points(subject: Subject, model: Model) -> list[dict[str, Any]]:
    """Return one entry per cut point after the first, in execution order."""
    start, layers = model.specialise().cut_points.start, set(model.layers)
    first = min(start.values(), default=0)
    named: dict[int, list[str]] = {}
    for name in sorted(start, key=lambda name: (start[name], name not in layers)):  # a layer's name first
        named.setdefault(start[name], []).append(name)
    named.pop(first, None)
    if not named:
        return []
    stages = split(model, [names[0] for names in named.values()])
    boundaries = infer_boundaries(stages, subject.params, model.with_needed_key(subject.batch), with_loss=False)
    return [
        {
            "names": names, "layer": names[0] in layers,
            "values": len(boundary.values), "bytes": boundary.num_bytes,
        }
        for names, boundary in zip(named.values(), boundaries.stages, strict=False)
    ]  # fmt: skip

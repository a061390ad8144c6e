"""One finding of one check, as plain data: a message, and the class in the user's source it is about."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["pass", "warn", "fail", "skip"]

TITLES: Mapping[str, str] = {
    "C1": "parameters can be sharded",
    "C2": "parameters are not written to",
    "C3": "loss",
    "C4": "no state between calls",
    "C5": "config",
    "P1": "can be split",
    "P2": "shared parameters",
    "P3": "rows are independent",
    "P4": "a batch that can be cut",
    "P5": "initialised without memory",
    "P6": "capture is exact",
    "P7": "layers can be cut",
}
"""What each check looks for, by code: C1 to C5 concern any sharded training, P1 to P7 pipelines and meshes."""


@dataclass(frozen=True)
class Where:
    """A class in the user's source.

    `file` and `line` are None for torch's own classes and those without a source. `module` is the path of one object of
    the class inside the checked module, empty for the module itself.
    """

    class_name: str
    file: str | None
    line: int | None
    module: str

    def __str__(self) -> str:
        place = f", {short_path(self.file)}:{self.line}" if self.file else ""
        return f"{self.class_name}{place}" + (f" ({self.module})" if self.module else "")


@dataclass(frozen=True)
class Verdict:
    """One finding of one check.

    Args:
        code: the check's code, see `TITLES`.
        status: "skip" if the check does not apply to this module, or concerns something that was not asked for.
        message: one sentence.
        where: the class to change or look at.
        data: details as JSON-compatible data. P1: "split_points", a list of {"names", "layer", "values", "bytes"}, in
            execution order; P2: "ties", a list of lists of names; P7: "axis", the "sizes" that work, and the one "asked"
            for.
    """

    code: str
    status: Status
    message: str
    where: Where | None = None
    data: Mapping[str, Any] = field(default_factory=dict)


def where(cls: type, module: str = "") -> Where:
    """Find where a class is defined.

    Args:
        cls: a class.
        module: path of an object of this class.
    """
    if is_torch(cls):
        return Where(cls.__name__, None, None, module)
    try:
        file, line = inspect.getsourcefile(cls), inspect.getsourcelines(cls)[1]
    except (OSError, TypeError):  # defined at a prompt, or not in Python
        file, line = None, 0
    return Where(cls.__name__, file, line if file else None, module)


def is_torch(cls: type) -> bool:
    """Return whether a class is one of torch's own."""
    return cls.__module__ == "torch" or cls.__module__.startswith("torch.")


def short_path(file: str) -> str:
    """Shorten a path for people: relative to the working directory, or to where packages are installed."""
    path = Path(file)
    for part in ("site-packages", "dist-packages"):
        if part in path.parts:
            return str(Path(*path.parts[path.parts.index(part) + 1 :]))
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else file

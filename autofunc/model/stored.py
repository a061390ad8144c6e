"""Initial values stored in files: their interface, and checks that they fit a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch

from autofunc.errors import ModelError, one_of
from autofunc.shown import quoted

CONVERTED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes that convert to each other: a parameter of one may be stored in any."""


def misfit(stored: torch.dtype | str, wanted: torch.dtype) -> str | None:
    """Return why a stored dtype is not read as another, as the predicate of a sentence; None if it is.

    Floating-point dtypes convert to each other. Integers, booleans, complex and 8-bit numbers mean something different, or
    come with scales.
    """
    if stored == wanted or (stored in CONVERTED and wanted in CONVERTED):
        return None
    has, needs = (str(dtype).removeprefix("torch.") for dtype in (stored, wanted))
    return f"is stored as {has}, which is not read as {needs}"


class Stored(Protocol):
    """Stored values of parameters, by canonical path."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each, by canonical path."""
        ...

    @property
    def dtypes(self) -> Mapping[str, torch.dtype | str]:
        """The dtype of each, by canonical path; its name if torch has no such dtype."""
        ...

    def read(self, names: Iterable[str]) -> Mapping[str, torch.Tensor]:
        """Read some of them, by canonical path; they may be views of files."""
        ...


def check_fit(stored: Stored, spec: Mapping[str, torch.Tensor]) -> None:
    """Refuse stored values that do not fit a model.

    Args:
        stored: the values.
        spec: canonical path -> a tensor with the model's shape and dtype.

    Raises:
        ModelError: naming a value that is missing, or has the wrong shape or an incompatible dtype.
    """
    for path, leaf in spec.items():
        if stored.shapes.get(path) != tuple(leaf.shape):
            has = f"{stored.shapes[path]}" if path in stored.shapes else "missing"
            near = one_of(path, stored.shapes)
            raise ModelError(f"stored {quoted(path)} is {has}, and the model needs {tuple(leaf.shape)}; {near}")
        words = misfit(stored.dtypes[path], leaf.dtype)
        if words is not None:
            raise ModelError(f"{quoted(path)} {words}")

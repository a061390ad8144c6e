"""Initial values that come from files: what they are to a model, and whether they fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch

from autofunc.errors import ModelError, one_of
from autofunc.shown import quoted

CONVERTED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes that a parameter of another of them may be stored in."""


def misfit(stored: torch.dtype | str, wanted: torch.dtype) -> str | None:
    """Why a tensor of one dtype is not read as one of another, as the rest of a sentence; None where it may be.

    Floating-point numbers are converted to other ones. Whole numbers, truth values, complex numbers and those of eight
    bits mean something else, or have scales beside them.
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
        """The dtype of each; of what torch has no dtype for, its name."""
        ...

    def read(self, names: Iterable[str]) -> Mapping[str, torch.Tensor]:
        """Some of them, by canonical path; they may be views of files."""
        ...


def check_fit(stored: Stored, spec: Mapping[str, torch.Tensor]) -> None:
    """Refuse stored values that are not those of a model.

    Args:
        stored: the values.
        spec: by canonical path, a tensor with the shape and the dtype that the model has.

    Raises:
        ModelError: naming what is missing, or has another shape or kind of dtype.
    """
    for path, leaf in spec.items():
        if stored.shapes.get(path) != tuple(leaf.shape):
            has = f"{stored.shapes[path]}" if path in stored.shapes else "missing"
            near = one_of(path, stored.shapes)
            raise ModelError(f"stored {quoted(path)} is {has}, and the model needs {tuple(leaf.shape)}; {near}")
        words = misfit(stored.dtypes[path], leaf.dtype)
        if words is not None:
            raise ModelError(f"{quoted(path)} {words}")

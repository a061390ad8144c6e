"""A model about to be trained, as a subject that single checks can run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from autofunc.captured import CapturedModel
from autofunc.checks.seeds import seeded
from autofunc.checks.subject import Subject
from autofunc.losses import Loss
from autofunc.model import Model

Inputs = Sequence[str] | Mapping[str, str] | None

_MOST_BYTES = 2**28  # of weights initialised only for a check


@contextmanager
def subject_of(model: Model, batch: Mapping[str, Any], loss: Loss | None, inputs: Inputs) -> Iterator[Subject | None]:
    """Yield a subject that runs the model and leaves it unchanged; None if it fails to run, or initialising costs too much.

    Args:
        model: captured, or made of layers.
        batch: a small example, with at least two rows.
        loss: see `af.pipeline`.
        inputs: see `af.from_module`.
    """
    checked = _runnable(model)
    if checked is None:
        yield None
        return
    if isinstance(checked, nn.Module):
        on = next((leaf.device for leaf in checked.parameters()), torch.device("cpu"))
        batch = {name: leaf.to(on) if isinstance(leaf, Tensor) else leaf for name, leaf in batch.items()}
    subject = Subject(checked, batch, loss, inputs, None)
    _ = subject.snapshot  # before anything runs
    try:
        with seeded(0), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the user does not run it this way
            yield None if subject.first.error else subject
    finally:
        subject.restore()


def _runnable(model: Model) -> nn.Module | Model | None:
    """Return the captured module if it has weights; else the model itself, or a module with initialised weights."""
    if isinstance(model, CapturedModel):
        on_meta = any(leaf.is_meta for leaf in model.module.parameters())
        if not on_meta:
            return model.module if model.is_module else model
        if not model.is_module:
            return None  # no initialisers are known
    if sum(leaf.numel() * leaf.element_size() for leaf in model.spec.values()) > _MOST_BYTES:
        return None
    if not isinstance(model, CapturedModel):
        return model
    return model.to_module(model.init_paths(model.spec, 0, "cpu"), model.init_state("cpu"))

"""`af.check`: find what prevents sharding and pipelining a module, on a small batch, in seconds."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from autofunc.checks.axes import AXES, check_axes
from autofunc.checks.config import check_config
from autofunc.checks.cuts import check_cuts
from autofunc.checks.empty_build import check_empty_build
from autofunc.checks.entries import check_entries
from autofunc.checks.independence import check_independence
from autofunc.checks.leftovers import check_leftovers
from autofunc.checks.loss import check_loss
from autofunc.checks.parameters import check_parameters
from autofunc.checks.report import Report
from autofunc.checks.seeds import seeded
from autofunc.checks.subject import ForwardError, Subject
from autofunc.checks.ties import check_ties
from autofunc.checks.verdict import Verdict
from autofunc.checks.whole_module import check_whole_module
from autofunc.checks.writes import check_writes
from autofunc.errors import AutofuncError, in_brief, one_of
from autofunc.fake import user_line
from autofunc.losses import Loss
from autofunc.model import Model
from autofunc.row_dims import BatchDims
from autofunc.shard import Sharding

UNFINISHED = "the check could not be finished: "
_LONGEST = 600
_NEED_A_RUN = ("C2", "C4", "P3", "P6")


def check(
    module: nn.Module | Model,
    batch: Mapping[str, Any],
    *,
    loss: Loss | None = None,
    inputs: Sequence[str] | Mapping[str, str] | None = None,
    registry: bool = False,
    rows: int | None = None,
    batch_dims: BatchDims = None,
    axes: Mapping[str, int] | None = None,
    sharding: Sharding | None = None,
) -> Report:
    """Find what prevents sharding and pipelining a module.

    It runs the module a few times, on the batch and on parts of it, and captures it. Afterwards the module and the global
    random generators are as before, bit for bit. It takes memory for a copy of all weights.

    Args:
        module: with real weights, in the mode (train or eval) it is used in; or a model, for which some checks are skipped.
        batch: a small example, with at least two rows.
        loss: see `af.pipeline`; by default the output's own.
        inputs: the entries passed to forward, see `af.from_module`.
        registry: whether a registry of models will find it, which requires a `config`.
        rows: how many rows the batch has, if its tensors leave that open.
        batch_dims: the dims that hold the rows, see `af.pipeline`.
        axes: sizes of "tp", "cp" and "ep" that a run would have: a layer that cannot be cut over them is then a failure.
        sharding: that run's choices.

    Raises:
        AutofuncError: for unknown axes.
        ModelError: for an object that is neither a module nor a model, or a module without weights.
        BatchError: if the number of rows cannot be told.

    Example:
        report = af.check(model, {"input_ids": ids, "labels": ids})
        assert report.ok, report  # print(report) shows it as a table
    """
    for axis in axes or {}:
        if axis not in AXES:
            raise AutofuncError(f"axes: {axis!r}; {one_of(axis, AXES)}")
    subject = Subject(module, batch, loss, inputs, rows, batch_dims)
    _ = subject.snapshot  # before anything runs
    checks: dict[str, Callable[[Subject], list[Verdict]]] = {
        "C1": check_parameters,
        "C2": check_writes,
        "C3": check_loss,
        "C4": check_leftovers,
        "C5": partial(check_config, registry=registry),
        "P1": check_cuts,
        "P2": check_ties,
        "P3": check_independence,
        "P4": check_entries,
        "P5": check_empty_build,
        "P6": check_whole_module,
        "P7": partial(check_axes, asked=dict(axes or {}), sharding=sharding or Sharding()),
    }
    verdicts: list[Verdict] = []
    with seeded(0), warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("ignore")  # checks run a module more often, and differently, than the user does
        for code, run in checks.items():
            verdicts += [replace(each, message=_one_line(each.message)) for each in _verdicts(code, run, subject)]
    return Report(subject.name, tuple(verdicts))


def _one_line(text: str) -> str:
    """Join the lines of a message from elsewhere, and shorten it."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."


def _verdicts(code: str, run: Callable[[Subject], list[Verdict]], subject: Subject) -> list[Verdict]:
    """Run one check; a failure inside it does not stop the others."""
    try:
        if code in _NEED_A_RUN and subject.first.error:
            return [Verdict(code, "skip", "forward does not run on this batch, see C3")]
        return run(subject)
    except ForwardError as error:
        return [Verdict(code, "fail", str(error), subject.where)]
    except Exception as error:  # a user's module may do anything
        line = user_line(traceback.extract_tb(error.__traceback__))
        return [Verdict(code, "fail", f"{UNFINISHED}{in_brief(error)} ({line})", subject.where)]
    finally:
        subject.restore()

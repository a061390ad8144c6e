"""What a run prints about its data and its speed."""

from __future__ import annotations

import io
import re

import pytest
import torch
from rich.console import Console
from torch.utils.data import Subset, TensorDataset

import autofunc as af
from autofunc import cache
from autofunc.data import START, Part, TextFolder
from autofunc.engine.compile import LOG
from autofunc.train.datasets import title
from autofunc.train.loop import _units
from autofunc.train.progress import ProgressReporter
from tests.cases import make_case


def test_datasets_have_names() -> None:
    rows = Subset(TensorDataset(torch.ones(5, 2)), range(3))
    assert title(rows) == "torch.utils.data.dataset.Subset, 3 rows"
    text = TextFolder(seq_len=64, num_samples_limit=4)
    assert title(text) == repr(text) and "0x" not in title(text)


def test_rows_are_not_called_tokens() -> None:
    part = lambda name: Part({name: torch.ones(2, 3)}, num_rows=2, ends_batch=True, after=START)  # noqa: E731
    assert (_units([part("pixel_values")]), _units([part("input_ids")])) == ((2, "rows"), (6, "tokens"))


def test_lines_show_changing_values() -> None:
    out = io.StringIO()
    with ProgressReporter(Console(file=out), 2) as reporter:
        reporter.step(1, 2.5, "10 rows/s")
    assert out.getvalue() == "step 1/2  loss 2.500  10 rows/s\n"


def test_the_last_measured_bubble_stays() -> None:
    out = io.StringIO()
    with ProgressReporter(Console(file=out), 3) as reporter:
        reporter.step(1, 2.5, "10 rows/s")
        reporter.step(2, 2.5, "10 rows/s", 0.1234)
        reporter.step(3, 2.5, "10 rows/s")
    assert out.getvalue().splitlines()[1] == "step 3/3  loss 2.500  10 rows/s  measured bubble 12.3%"


def test_compilation_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first compiled step of a large model takes minutes."""
    monkeypatch.setattr(cache, "shared", cache.Cache(most=64))
    monkeypatch.setattr("autofunc.engine.compile._compile", lambda *_: list)
    model, _, loss, batch = make_case("mlp", 1, 4)
    s = af.schedule.build("1f1b", num_ranks=1, num_microbatches=2)
    out, before = io.StringIO(), LOG.level
    with ProgressReporter(Console(file=out), 2):
        af.pipeline(af.split(model), s, loss=loss, compile=True).build(batch)
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("compiling forward of stage 0") and re.search(
        r"^compiled forward of .* in \d+\.\d s$", lines[1]
    )
    assert sum(line.startswith("compiled") for line in lines) == 2, "forward and backward"
    assert LOG.level == before and not LOG.handlers

"""What a run says of its data and of its speed."""

from __future__ import annotations

import io

import torch
from rich.console import Console
from torch.utils.data import Subset, TensorDataset

from autofunc.data import Part, TextFolder
from autofunc.train.datasets import title
from autofunc.train.loop import _unit
from autofunc.train.progress import ProgressReporter


def test_datasets_have_names() -> None:
    rows = Subset(TensorDataset(torch.ones(5, 2)), range(3))
    assert title(rows) == "torch.utils.data.dataset.Subset, 3 rows"
    text = TextFolder(seq_len=64, num_samples_limit=4)
    assert title(text) == repr(text) and "0x" not in title(text)


def test_rows_are_not_called_tokens() -> None:
    part = lambda name: Part({name: torch.ones(2, 3)}, num_rows=2, ends_batch=True)  # noqa: E731
    assert (_unit([part("pixel_values")]), _unit([part("input_ids")])) == ("rows", "tokens")


def test_lines_say_what_changes() -> None:
    out = io.StringIO()
    with ProgressReporter(Console(file=out), 2) as reporter:
        reporter.step(1, 2.5, "10 rows/s")
    assert out.getvalue() == "step 1/2  loss 2.500  10 rows/s\n"

"""Commands that a cell of a notebook runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cli.here import run_here


@pytest.mark.parametrize(("given", "used"), [("module://matplotlib_inline.backend_inline", "agg"), ("pdf", "pdf")])
def test_a_notebooks_backend_need_not_be_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, used: str
) -> None:
    """Notebooks set their backend for every process they start, and matplotlib cannot be imported without it."""
    monkeypatch.setenv("MPLBACKEND", given)
    assert run_here(tmp_path, "schedule", "list").status == 0
    assert os.environ["MPLBACKEND"] == used

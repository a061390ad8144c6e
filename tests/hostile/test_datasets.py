"""Datasets that are broken or hostile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
from pyarrow import parquet

from autofunc.data import HellaSwag, TextFolder
from tests.hostile.datasets import DATASETS
from tests.hostile.judge import faults

KINDS: dict[str, Any] = {"HellaSwag": HellaSwag, "TextFolder": TextFolder}


assert datasets and parquet  # imported here: that takes seconds, and is no part of a case


def read(given: Any) -> None:
    KINDS[given.kind](str(given.path), **given.options)


def test_datasets(tmp_path: Path) -> None:
    assert len(DATASETS) >= 50
    found = faults(DATASETS, read, tmp_path)
    assert not found, "\n".join(found)
    assert not list(tmp_path.rglob("executed"))

"""Tests on an accelerator: `make test-gpu`. All ranks run in one process, on one device."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # the same bits each time

import pytest
import torch


@pytest.fixture(autouse=True)
def deterministic_kernels() -> Iterator[None]:
    """The laws are of bits, so kernels that add in any order are left out."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)

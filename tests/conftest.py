"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["OMP_NUM_THREADS"] = "1"  # bitwise laws hold on one thread
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest
import torch

from tests.pool import WorkerPool

torch.set_num_threads(1)
hypothesis.settings.register_profile("default", deadline=None, derandomize=True)
hypothesis.settings.load_profile("default")


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    """Four gloo processes, started when the first test asks for them."""
    pool = WorkerPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def eight_workers() -> Iterator[WorkerPool]:
    """Eight of them."""
    pool = WorkerPool(8)
    yield pool
    pool.close()

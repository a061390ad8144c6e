"""Fixtures and settings of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # bitwise laws hold on one thread
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["AUTOFUNC_CACHE"] = "off"  # nothing of a test is left for another
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(__file__).parents[1] / ".inductor_cache")  # kept from run to run
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # each process would start as many compiling ones as there are cores

import hypothesis
import pytest
import torch
from hypothesis.database import DirectoryBasedExampleDatabase

from tests.pool import WorkerPool

EXAMPLES = Path(__file__).parents[1] / ".hypothesis" / "examples"

torch.set_num_threads(1)
hypothesis.settings.register_profile("default", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.register_profile(
    "full", deadline=None, max_examples=200, database=DirectoryBasedExampleDatabase(EXAMPLES)
)
hypothesis.settings.load_profile("default")


# Pools live as long as a file: a thread of every gloo group wakes a hundred times a second until its process ends, which
# slows down all that runs beside it. New workers are forked in a fraction of a second.
@pytest.fixture(scope="module")
def workers() -> Iterator[WorkerPool]:
    """Four gloo processes."""
    pool = WorkerPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def eight_workers() -> Iterator[WorkerPool]:
    pool = WorkerPool(8)
    yield pool
    pool.close()


def pytest_itemcollected(item: pytest.Item) -> None:
    """A full run looks for other examples where tests are over generated ones."""
    others = item.config.getoption("--hypothesis-profile") == "full"
    if others and hypothesis.is_hypothesis_test(getattr(item, "obj", None)):
        item.add_marker(pytest.mark.full)

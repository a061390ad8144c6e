"""Fixtures of all tests, and how they are shared out among the processes of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # bitwise laws hold on one thread
os.environ["HF_HUB_OFFLINE"] = "1"
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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Say what stays together in one process of a run with several (`-n 2 --dist loadgroup`).

    All that uses a pool does, so that there is one of each size, and so do the tests of a file, which share what they make.
    A full run looks for other examples where tests are over generated ones.
    """
    others = config.getoption("--hypothesis-profile") == "full"
    for item in items:
        if others and hypothesis.is_hypothesis_test(getattr(item, "obj", None)):
            item.add_marker(pytest.mark.full)
        shares_a_pool = not {"workers", "eight_workers"}.isdisjoint(getattr(item, "fixturenames", ()))
        item.add_marker(pytest.mark.xdist_group("pool" if shares_a_pool else item.nodeid.partition("::")[0]))

"""Fixtures of all tests, and how they are shared out among the processes of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # bitwise laws hold on one thread
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(__file__).parents[1] / ".inductor_cache")  # kept from run to run
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # each process would start as many compiling ones as there are cores

import hypothesis
import pytest
import torch
from hypothesis.database import DirectoryBasedExampleDatabase
from xdist.scheduler import LoadScopeScheduling

from tests.pool import WorkerPool

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / ".hypothesis" / "examples"

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


@pytest.fixture(scope="module")
def eight_workers() -> Iterator[WorkerPool]:
    """Eight of them, for one file: threads of their groups wake all the time, which slows down what comes after."""
    pool = WorkerPool(8)
    yield pool
    pool.close()


class ByFile(LoadScopeScheduling):
    """The tests of a file stay together in one process of a run with several (`-n 2`), for they share what they make.

    So do all files that use a pool of workers, so that there is one of each size. (Marks of groups, xdist's own way, have
    no effect with pytest 9.2.)
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "pool" if _uses_a_pool(file) else file


@cache
def _uses_a_pool(file: str) -> bool:
    return "WorkerPool" in (ROOT / file).read_text()


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


def pytest_itemcollected(item: pytest.Item) -> None:
    """A full run looks for other examples where tests are over generated ones."""
    others = item.config.getoption("--hypothesis-profile") == "full"
    if others and hypothesis.is_hypothesis_test(getattr(item, "obj", None)):
        item.add_marker(pytest.mark.full)

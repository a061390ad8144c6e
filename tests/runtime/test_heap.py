"""Freed memory stays with the process, unless its environment tunes malloc itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from autofunc.runtime import heap

# 64 MiB in blocks of 1 MiB, written and freed again and again: page faults of the last round
ROUNDS = """
import resource, runpy, sys
keep = runpy.run_path(sys.argv[1])["keep_freed_memory"]
print(keep(), keep())
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytearray(b"x") * (1 << 20) for _ in range(64)]
    del blocks
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 64 * 256


def faults(environment: dict[str, str]) -> tuple[str, int]:
    """(what the function returned, page faults of the last round) in a new process."""
    around = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", ROUNDS, str(Path(heap.__file__))]
    done = subprocess.run(command, env=around | environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    return lines[0], int(lines[-1])


def test_freed_memory_is_not_faulted_in_again() -> None:
    kept, again = faults({})
    assert kept == "True True"
    assert again < PAGES / 100


@pytest.mark.parametrize(
    "environment",
    [{"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}, {"MALLOC_TRIM_THRESHOLD_": "131072"}],
    ids=lambda environment: next(iter(environment)),
)
def test_what_the_environment_tunes_is_left_alone(environment: dict[str, str]) -> None:
    kept, again = faults(environment)
    assert kept == "False False"
    assert again > PAGES / 2

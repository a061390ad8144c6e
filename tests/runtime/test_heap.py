"""Freed memory stays with the process, unless its environment tunes malloc itself."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys

import pytest

import autofunc as af
from autofunc.runtime import heap, plans
from tests.cases import make_case

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
PAGES = (64 << 20) // resource.getpagesize()

on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets glibc's malloc")


def faults(environment: dict[str, str]) -> tuple[str, int]:
    """(what the function returned, page faults of the last round) in a new process."""
    others = ("MALLOC_", "GLIBC_", "LD_PRELOAD")
    around = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    command = [sys.executable, "-c", ROUNDS, heap.__file__]
    done = subprocess.run(command, env=around | environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    return lines[0], int(lines[-1])


@on_glibc
def test_freed_memory_is_not_faulted_in_again() -> None:
    kept, again = faults({})
    assert kept == "True True"
    assert again < PAGES / 100


@on_glibc
@pytest.mark.parametrize(
    "environment",
    [{"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}, {"MALLOC_TRIM_THRESHOLD_": "131072"}],
    ids=lambda environment: next(iter(environment)),
)
def test_what_the_environment_tunes_is_left_alone(environment: dict[str, str]) -> None:
    kept, again = faults(environment)
    assert kept == "False False"
    assert again > PAGES / 2


def test_a_pipeline_on_cpu_keeps_it_before_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(plans, "keep_freed_memory", lambda: calls.append("kept"))
    _, stages, loss, batch = make_case("mlp", 2, rows=4)
    pipe = af.pipeline(stages, af.schedule.build("1f1b", num_ranks=2, num_microbatches=2), loss=loss)
    for _ in range(2):
        af.value_and_grad(pipe)(pipe.init(), batch, (0, 1))
    assert calls == ["kept"]

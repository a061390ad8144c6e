"""Describe the machine that a number was measured on."""

from __future__ import annotations

import os
import platform


def describe_machine() -> str:
    """Return processor, cores, and versions of torch and Python, in one line."""
    import torch  # after the caller has set OMP_NUM_THREADS

    from autofunc.benchmark.teams import processor

    capability = torch.backends.cpu.get_cpu_capability()
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{processor()} ({capability}), {os.cpu_count()} cores, {versions}"

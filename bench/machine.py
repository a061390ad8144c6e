"""What a number was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def describe_machine() -> str:
    """Processor, cores, and versions of torch and Python, in one line."""
    import torch  # after the caller has set OMP_NUM_THREADS

    names = Path("/proc/cpuinfo")
    lines = names.read_text().splitlines() if names.exists() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = found[0] if found else platform.processor() or platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{processor} ({capability}), {os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"
    )

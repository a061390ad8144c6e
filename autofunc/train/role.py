"""The role of a process in a run, read from its environment."""

from __future__ import annotations

import os
from pathlib import Path

CHECKED = "AUTOFUNC_CHECKED"
"""Environment variable: "1" if another process has tried the configuration."""

PARENT = "AUTOFUNC_PARENT"
"""Environment variable: id of the process that a worker was forked from."""

POSITIONS = "AUTOFUNC_POSITIONS"
"""Environment variable: the file in which each worker records its position; see `runtime.position`."""


def is_worker() -> bool:
    """Return whether torchrun or `launch` started this process."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def was_checked() -> bool:
    """Return whether `launch` started this process; its caller has then tried the configuration."""
    return os.environ.get(CHECKED) == "1"


def restarts() -> int:
    """Return how often torch's elastic agent has restarted the workers."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def positions_file() -> Path | None:
    """Return the file for workers' positions; None unless `launch` started this process."""
    named = os.environ.get(POSITIONS)
    return Path(named) if named else None

"""What a process is for in a run, as its environment says."""

from __future__ import annotations

import os
from pathlib import Path

CHECKED = "AUTOFUNC_CHECKED"
"""Environment variable: "1" where another process has tried the configuration."""

PARENT = "AUTOFUNC_PARENT"
"""Environment variable: id of the process that a worker was forked from."""

POSITIONS = "AUTOFUNC_POSITIONS"
"""Environment variable: the file in which each worker writes down where it is; see `runtime.position`."""


def is_worker() -> bool:
    """Whether this process was started by torchrun, or by `launch`."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def was_checked() -> bool:
    """Whether `launch` started this process: then the one that called it has tried the configuration."""
    return os.environ.get(CHECKED) == "1"


def restarts() -> int:
    """How often torch's elastic agent has started the workers again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def positions_file() -> Path | None:
    """Where workers write down where they are; None for those that something else than `launch` started."""
    named = os.environ.get(POSITIONS)
    return Path(named) if named else None

"""NCCL's flight recorder in torch: each rank's last collectives, dumped to files when a hang ends a run.

The variables are those of torch 2.13 (`FlightRecorder.hpp`, `ProcessGroupNCCL.hpp`), which reads the older names too.
Private part of torch used: `_dump_nccl_trace`, in builds with NCCL; tried with 2.13.0 through its sibling `_dump_fr_trace`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch._C._distributed_c10d as c10d
import torch.distributed as dist

from autofunc.train.logs import write_log
from autofunc.train.output import LOGS, TRACE

_EVENTS = "2000"
_SIZE = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
_DUMPS = ("TORCH_NCCL_DUMP_ON_TIMEOUT",)
_FILE = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
"""Variables by name, each followed by its older name."""


@dataclass(frozen=True)
class FlightRecorder:
    """The flight recorder of a run's workers on GPUs.

    Args:
        folder: the run's.
    """

    folder: Path

    @property
    def _prefix(self) -> str:
        """Beginning of the dump files' names; the rank follows."""
        return _given(_FILE) or str((self.folder / LOGS / TRACE).absolute())

    def variables(self) -> dict[str, str]:
        """Return the workers' environment variables, keeping what the user has set."""
        wanted = ((_SIZE, _EVENTS), (_DUMPS, "1"), (_FILE, self._prefix))
        return {names[0]: value for names, value in wanted if not any(name in os.environ for name in names)}

    def dumps(self, since: float) -> list[str]:
        """Return a line that names the dumps, if there are any.

        Args:
            since: start of the workers, in seconds of the epoch; older files belong to earlier runs.
        """
        prefix = Path(self._prefix)
        found = [each for each in prefix.parent.glob(f"{prefix.name}*") if each.stat().st_mtime >= since]
        if not found:
            return []
        files = ", ".join(sorted(each.name for each in found))
        return [f"NCCL's flight recorder: {prefix.parent}: {files} (torchfrtrace -p {prefix.name} {prefix.parent})"]


def keep_record() -> None:
    """Dump this process's record, as torch would after its own timeout; a no-op if the recorder is off."""
    dump, prefix, events = getattr(c10d, "_dump_nccl_trace", None), _given(_FILE), _given(_SIZE)
    if dump is None or prefix is None or events in (None, "0"):
        return
    file = Path(f"{prefix}{dist.get_rank()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(dump())
    except OSError as error:  # the hang must be reported all the same
        write_log(f"NCCL's flight recorder could not be written: {error}\n")


def _given(names: tuple[str, str]) -> str | None:
    """Return the variable's value in the environment."""
    return next((os.environ[name] for name in names if name in os.environ), None)

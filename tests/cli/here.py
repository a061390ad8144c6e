"""Run the command line in this process: what a user types, without the seconds that a new process takes to start."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from autofunc.automodel.registry import ARCHITECTURES
from autofunc.cli import main, train


class Done(NamedTuple):
    """The outcome of a command."""

    status: int
    out: str
    err: str


def run_here(folder: Path, *words: str) -> Done:
    """Run `autofunc` in a folder. Nothing stays in the process: modules of the folder, paths, registered classes."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    known = set(sys.modules)
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["autofunc", *words])
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(ARCHITECTURES, "_classes", {})
        patch.setattr(ARCHITECTURES, "_installed", None)
        patch.setattr(train, "start_fork_server", lambda *_: contextlib.nullcontext())  # there are no workers here
        environment = {"NO_COLOR": "1", "COLUMNS": "80"}
        set_by_commands = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        for name, value in (environment | set_by_commands).items():
            patch.setenv(name, value)
        try:
            main.main()
        except SystemExit as stopped:
            assert stopped.code is None or isinstance(stopped.code, int)
            status = stopped.code or 0
        finally:
            _forget(set(sys.modules) - known, folder)
    return Done(status, out.getvalue(), err.getvalue())


def _forget(names: set[str], folder: Path) -> None:
    """Drop modules that were imported from a folder."""
    for name in names:
        places = [getattr(sys.modules[name], "__file__", None), *getattr(sys.modules[name], "__path__", [])]
        if any(place and Path(place).is_relative_to(folder) for place in places):
            del sys.modules[name]

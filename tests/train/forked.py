"""The work of forked workers in tests. Its imports are cheap."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TextIO


def end(hows: list[str]) -> None:
    how = hows[int(os.environ["RANK"])]
    if how.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, how))
    if how == "sleep":
        time.sleep(60)
    if how == "leave":
        os._exit(7)


def note(folder: Path) -> None:
    import random

    import numpy as np

    drawn = f"DRAWN={random.random()} {np.random.rand()}"
    (folder / os.environ["RANK"]).write_text("\n".join([drawn, *(f"{name}={value}" for name, value in os.environ.items())]))


def note_and_sleep(folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(60)


def leave_open() -> None:
    _left.append(Path("left", os.environ["RANK"]).open("w"))  # noqa: SIM115
    _left[0].write("written")


_left: list[TextIO] = []

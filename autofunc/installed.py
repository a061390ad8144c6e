"""Tell the user's files from those of Python, installed libraries, and this one."""

from __future__ import annotations

import os
import sys
import sysconfig
from functools import cache
from pathlib import Path

_LIBRARIES = (sysconfig.get_paths()["stdlib"], str(Path(__file__).parent))


def is_installed(filename: str) -> bool:
    """Return whether a file is not the user's."""
    if filename.startswith(_LIBRARIES) or not {"site-packages", "dist-packages"}.isdisjoint(Path(filename).parts):
        return True
    return any(filename.startswith(f"{folder}{os.sep}") and holds_packages(folder) for folder in sys.path if folder)


def is_of_torch(filename: str) -> bool:
    """Return whether a file is torch's."""
    return "torch" in Path(filename).parts


@cache
def holds_packages(folder: str) -> bool:
    """Return whether pip has installed into a folder, whatever its name: package metadata lies beside the packages."""
    return next(Path(folder).glob("*.dist-info"), None) is not None

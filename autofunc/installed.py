"""Which files are the user's, and which those of Python, of installed libraries, or of this one."""

from __future__ import annotations

import os
import sys
import sysconfig
from functools import cache
from pathlib import Path

_LIBRARIES = (sysconfig.get_paths()["stdlib"], str(Path(__file__).parent))


def is_installed(filename: str) -> bool:
    """Whether a file is none of the user's."""
    if filename.startswith(_LIBRARIES) or not {"site-packages", "dist-packages"}.isdisjoint(Path(filename).parts):
        return True
    return any(filename.startswith(f"{folder}{os.sep}") and holds_packages(folder) for folder in sys.path if folder)


def is_of_torch(filename: str) -> bool:
    """Whether a file is torch's."""
    return "torch" in Path(filename).parts


@cache
def holds_packages(folder: str) -> bool:
    """Whether pip has installed into it, under whatever name: what it knows of each package lies beside the package."""
    return next(Path(folder).glob("*.dist-info"), None) is not None

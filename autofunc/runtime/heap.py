"""Memory that CPU steps allocate and free stays with the process, so that the next step finds it mapped.

glibc gives the top of its heap back to the system, and takes large blocks from it one by one. A step frees most of what
it allocates, and the next one would fault all of its pages in again: a looped_bfs step of small GPT-2 stages took 2 to
8 % longer, and its later forwards 30 % (`bench/heap.py`).
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_NEVER = -1
_LARGEST_BLOCK = 1 << 25  # bytes, as far as glibc raises it by itself; larger blocks are mapped one by one
_OF_THE_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")


@cache
def keep_freed_memory() -> bool:
    """Have glibc keep what is freed, once for the whole process; return whether it does.

    Nothing changes where the environment tunes glibc's malloc itself (`MALLOC_TRIM_THRESHOLD_` and its like,
    `GLIBC_TUNABLES=glibc.malloc...`), or with another C library.
    """
    tuned = any(name in os.environ for name in _OF_THE_USER) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if tuned or mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK) and mallopt(_M_TRIM_THRESHOLD, _NEVER))

"""Memory that CPU steps allocate and free stays with the process, so that the next step finds it mapped.

glibc gives the top of its heap back to the system, and maps large blocks one by one. A step frees most of what it
allocates, and the next one may fault those pages in again: up to 11,000 of them in a looped_bfs step of small GPT-2
stages (`bench/heap.py`), which also makes the same action longer in one schedule than in another.

Blocks of more than 32 MiB are still mapped one by one, and whole heaps of threads other than the main one may go.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_NEVER = -1
_LARGEST_BLOCK = 1 << 25  # bytes, as far as glibc raises it by itself


@cache
def keep_freed_memory() -> bool:
    """Have glibc keep what is freed, once for the whole process; return whether it accepted that.

    Nothing changes with another C library, or where the environment tunes malloc (`MALLOC_...`,
    `GLIBC_TUNABLES=glibc.malloc...`). There is no effect if another malloc is preloaded.
    """
    tuned = any(name.startswith("MALLOC_") for name in os.environ)
    tuned = tuned or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if tuned or mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK) and mallopt(_M_TRIM_THRESHOLD, _NEVER))

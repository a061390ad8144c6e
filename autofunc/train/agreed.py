"""The exchange of all processes once a step: which rows they have read, and whether any was asked to stop."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from autofunc.data import Part
from autofunc.mesh import data_coordinate, over_host

_ABSENT = torch.iinfo(torch.int64).min


class Flags(NamedTuple):
    """One process's flags; after `agree`, each is true if any process set it."""

    is_asked_to_end: bool = False
    is_writing: bool = False  # a checkpoint is being written


def agree(mesh: DeviceMesh | None, parts: Sequence[Part], flags: Flags, device: torch.device) -> tuple[bool, Flags]:
    """Return (whether the ranks of each pipeline read the same rows, the flags that any process set), equal on all ranks.

    All processes exchange this once, between hosts, without waiting for a device.

    Args:
        mesh: of the run; None with a single process.
        parts: the rows this process has read for the step.
        flags: this process's flags.
        device: of this process; used if the process group has no backend for the host.
    """
    if mesh is None:
        return True, flags
    (place, places), rows = data_coordinate(mesh), _checksum(parts)
    numbers = torch.full((2 * places + len(flags),), _ABSENT, dtype=torch.int64)
    numbers[2 * place], numbers[2 * place + 1] = rows, -rows
    numbers[2 * places :] = torch.tensor(flags)
    everywhere = numbers.to(over_host(dist.group.WORLD, device))
    dist.all_reduce(everywhere, dist.ReduceOp.MAX)
    most, least = everywhere[: 2 * places].view(places, 2).cpu().unbind(1)
    return bool((most == -least).all()), Flags(*map(bool, everywhere[2 * places :].tolist()))


def _checksum(parts: Sequence[Part]) -> int:
    """Return a 32-bit checksum of the rows."""
    number = 0
    for part in parts:
        for leaf in part.batch.values():
            number = zlib.crc32(_bytes_of(leaf), number)
    return number


def _bytes_of(leaf: Tensor) -> memoryview:
    return leaf.contiguous().view(torch.uint8).numpy().data

"""What all processes of a run tell each other once a step: which rows they have read, and what they were asked for."""

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


class Said(NamedTuple):
    """What one process says, or all of them together: then whether any does."""

    is_asked_to_end: bool = False
    is_writing: bool = False  # a checkpoint


def agree(mesh: DeviceMesh | None, parts: Sequence[Part], said: Said, device: torch.device) -> tuple[bool, Said]:
    """(Whether the ranks of each pipeline have read the same rows, what any process says), alike on all.

    One exchange of all processes, between their hosts: it waits for no device that computes.

    Args:
        mesh: of the run; None where this process is alone.
        parts: the rows that this process has read for the step.
        said: by this process.
        device: of this process, for a run whose process group has no backend for the host.
    """
    if mesh is None:
        return True, said
    (place, places), rows = data_coordinate(mesh), _checksum(parts)
    numbers = torch.full((2 * places + len(said),), _ABSENT, dtype=torch.int64)
    numbers[2 * place], numbers[2 * place + 1] = rows, -rows
    numbers[2 * places :] = torch.tensor(said)
    everywhere = numbers.to(over_host(dist.group.WORLD, device))
    dist.all_reduce(everywhere, dist.ReduceOp.MAX)
    most, least = everywhere[: 2 * places].view(places, 2).cpu().unbind(1)
    return bool((most == -least).all()), Said(*map(bool, everywhere[2 * places :].tolist()))


def _checksum(parts: Sequence[Part]) -> int:
    """32 bits that tell these rows from others."""
    number = 0
    for part in parts:
        for leaf in part.batch.values():
            number = zlib.crc32(_bytes_of(leaf), number)
    return number


def _bytes_of(leaf: Tensor) -> memoryview:
    return leaf.contiguous().view(torch.uint8).numpy().data

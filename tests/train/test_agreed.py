"""After one exchange per step, all processes know the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from autofunc.data import START, Part
from autofunc.mesh import data_coordinate
from autofunc.train.agreed import Flags, agree
from tests.cases import mesh_of
from tests.pool import WorkerPool

CPU = torch.device("cpu")


def part(number: float) -> Part:
    return Part({"x": torch.full((2, 3), number), "mask": torch.ones(2, dtype=torch.bool)}, 2, True, START)


def agreed(sizes: dict[str, int], odd: int | None, asked: int | None, writing: int | None) -> tuple[bool, Flags, int]:
    """Return what a process knows, after how many exchanges, if one has read other rows and two have set flags."""
    mesh, rank, exchanges = mesh_of(**sizes), dist.get_rank(), []
    all_reduce = dist.all_reduce

    def counted(*given: Any, **options: Any) -> Any:
        exchanges.append(given)
        return all_reduce(*given, **options)

    dist.all_reduce = counted
    try:
        place, _ = data_coordinate(mesh)
        rows = part(100.0 if rank == odd else place)
        is_same, flags = agree(mesh, [rows, rows], Flags(rank == asked, rank == writing), CPU)
    finally:
        dist.all_reduce = all_reduce
    return is_same, flags, len(exchanges)


@pytest.mark.parametrize("sizes", [{"pp": 4}, {"pp": 2, "dp_shard": 2}, {"dp_replicate": 2, "tp": 2}], ids=str)
def test_all_ranks_agree_in_one_exchange(workers: WorkerPool, sizes: dict[str, int]) -> None:
    assert workers.run(agreed, sizes, None, None, None) == [(True, Flags(False, False), 1)] * 4
    assert workers.run(agreed, sizes, None, 3, None) == [(True, Flags(True, False), 1)] * 4
    assert workers.run(agreed, sizes, 2, 1, 0) == [(False, Flags(True, True), 1)] * 4


def test_one_process_exchanges_nothing() -> None:
    assert agree(None, [part(0.0)], Flags(True, False), CPU) == (True, Flags(True, False))

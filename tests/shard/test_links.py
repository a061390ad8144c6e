"""Sockets between the ranks of one machine, whatever their process group was started as."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from autofunc.shard.links import links
from tests.pool import WorkerPool


def summed(backend: str) -> list[float] | None:
    """Everyone's rank and one, added up."""
    group = dist.new_group(backend=backend)
    found = links(group)
    if found is None:
        return None
    parts = found.exchange([torch.full((3,), dist.get_rank() + 1.0)] * dist.get_world_size())
    total: list[float] = torch.stack(parts).sum(0).tolist()
    dist.destroy_process_group(group)
    return total


@pytest.mark.parametrize("backend", ["gloo", "cpu:gloo"])  # torchrun and `make_mesh` alone give the latter
def test_ranks_of_one_machine(workers: WorkerPool, backend: str) -> None:
    found = workers.run(summed, backend)
    size = len(found)
    assert found == [[size * (size + 1) / 2] * 3] * size

"""Sockets between the ranks of one machine: exchanges that overlap, and any kind of process group."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from autofunc.errors import PeerLostError
from autofunc.shard.links import Links, links
from tests.pool import WorkerPool
from tests.thread_ranks import Meeting

Ends = tuple[socket.socket, socket.socket]


@pytest.fixture
def ends() -> Iterator[Ends]:
    pair = socket.socketpair()
    for end in pair:
        end.settimeout(20)
    yield pair
    for end in pair:
        end.close()


def two(ends: Ends) -> list[Links]:
    return [Links(rank, {1 - rank: end}) for rank, end in enumerate(ends)]


@pytest.mark.parametrize("numbers", [3, 50_000])  # one chunk, and several
def test_two_exchanges_at_once_keep_their_order(ends: Ends, numbers: int) -> None:
    both = two(ends)

    def work(rank: int) -> list[list[Tensor]]:
        first = both[rank].begin([torch.full((numbers,), 1.0 + rank)] * 2)
        second = both[rank].begin([torch.full((numbers,), 11.0 + rank)] * 2)
        return [second(), first(), first(), both[rank].exchange([torch.full((2,), 21.0 + rank)] * 2)]

    for found in Meeting(2).run(work):
        assert [[part[-1].item() for part in parts] for parts in found] == [[11, 12], [1, 2], [1, 2], [21, 22]]
        assert all(torch.equal(part, part[:1].expand_as(part)) for parts in found for part in parts)


def test_a_rank_that_is_gone(ends: Ends) -> None:
    wait = two(ends)[0].begin([torch.zeros(2)] * 2)
    ends[1].close()
    with pytest.raises(PeerLostError, match="another tp rank is gone or too late"):
        wait()


def summed(backend: str) -> list[float] | None:
    """Sum rank + 1 over all ranks."""
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

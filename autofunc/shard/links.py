"""Sockets between the tp ranks of one machine, for the exchanges of captured stages on CPU.

A stage waits for every exchange, so the latency of small messages counts. gloo hands messages to its own
threads, which compete for cores with the waiting ranks: 32 KB take 0.8 to 1.1 ms between two computing processes; over a
Unix socket, 0.08 ms (two cores).
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from autofunc.errors import PeerLostError
from autofunc.shard.unix_sockets import bytes_of, connect, fill

_SMALL = 1 << 20
"""Bytes up to which more than two ranks exchange directly."""
_CHUNK = 1 << 16
"""Bytes sent before as many are received: few enough for socket buffers, so that no sender waits for a reader."""

# one entry per group, as long as it lives: connecting is costly, and all pipelines on a mesh can share the sockets
_made: WeakKeyDictionary[dist.ProcessGroup, Links | None] = WeakKeyDictionary()


def links(group: dist.ProcessGroup) -> Links | None:
    """Connect all ranks of a group, once; all of them call it.

    Returns:
        The connections; None if ranks are on several machines, cannot have sockets, or the group does not use gloo on CPU.
    """
    if group not in _made:
        peers, is_whole = connect(group)
        _made[group] = Links(group.rank(), peers) if is_whole else None
    return _made[group]


def suits_sockets(device: torch.device, num_bytes: int, num_ranks: int) -> bool:
    """Return whether ranks exchange tensors of this size faster over `links` than by collectives."""
    return device.type == "cpu" and num_bytes > 0 and (num_ranks == 2 or num_bytes <= _SMALL)


class Links:
    """Connected sockets to all other ranks of a group."""

    def __init__(self, rank: int, peers: dict[int, socket.socket]) -> None:
        self._rank, self._peers = rank, peers
        self._under_way: _Exchange | None = None
        self.size = len(peers) + 1

    def begin(self, parts: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Send one part to each rank; return a function that waits for each rank's part, in rank order.

        All parts have one shape and dtype on all ranks. At most one exchange is in progress: the next waits for it first.

        Raises:
            PeerLostError: if another rank is gone or too late.
        """
        if self._under_way is not None:
            self._under_way.wait()
        self._under_way = begun = _Exchange(self, self._rank, self._peers, parts)
        return begun.wait

    def exchange(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Exchange parts and wait, see `begin`."""
        return self.begin(parts)()

    def ended(self) -> None:
        """Note that no exchange is in progress."""
        self._under_way = None


class _Exchange:
    """An exchange: sends the first chunk at once, and the rest while reading those of others."""

    def __init__(
        self, links: Links, own: int, peers: Mapping[int, socket.socket], parts: Sequence[Tensor]
    ) -> None:  # fmt: skip
        self._links: Links | None = links
        self._peers, self._bytes = peers, parts[own].numel() * parts[own].element_size()
        self._found = [part if rank == own else torch.empty_like(parts[own]) for rank, part in enumerate(parts)]
        self._outgoing = {rank: bytes_of(parts[rank]) for rank in peers}
        self._incoming = {rank: bytes_of(self._found[rank]) for rank in peers}
        with _lost_peers():
            self._send(0)

    def wait(self) -> list[Tensor]:
        """Wait for the part of each rank, in rank order."""
        links, self._links = self._links, None
        if links is not None:
            links.ended()
            with _lost_peers():
                for start in range(0, self._bytes, _CHUNK):
                    if start:
                        self._send(start)
                    for rank, peer in self._peers.items():
                        fill(peer, self._incoming[rank][start : start + _CHUNK])
        return self._found

    def _send(self, start: int) -> None:
        for rank, peer in self._peers.items():
            peer.sendall(self._outgoing[rank][start : start + _CHUNK])


@contextmanager
def _lost_peers() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PeerLostError(f"another tp rank is gone or too late: {error}") from error

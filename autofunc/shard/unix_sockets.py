"""Unix sockets between the ranks of one machine: connecting, and tensors as bytes.

gloo hands messages to its own threads, which compete for cores with the ranks that compute and wait. Reading and writing a
socket in the rank's own thread avoids that; the kernel buffers what the other end has not read yet.
"""

from __future__ import annotations

import shutil
import socket
import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from autofunc.mesh import timeout_of

_BUFFER_BYTES = 1 << 22  # asked for; Linux caps it at net.core.wmem_max


class Reached(NamedTuple):
    """The ranks of a group that sockets reach."""

    peers: dict[int, socket.socket]  # by rank in the group, sorted; without this rank
    is_whole: bool  # every rank reaches every other; the same on all ranks


def connect(group: dist.ProcessGroup) -> Reached:
    """Connect to the ranks of a group that are on this machine. All ranks of the group call it.

    Groups that do not use gloo on CPU, where sockets can stand in for it, are not connected.
    """
    # groups that torch makes by default are "cpu:gloo" ones, whose name `get_backend` does not know
    if "cpu:gloo" not in dist.get_backend_config(group):
        return Reached({}, False)
    own, size, timeout = group.rank(), group.size(), timeout_of(group)
    with _listening(size) as (listener, path):
        paths: list[str] = _of_all(path, group)
        peers = {rank: peer for rank in range(own) if (peer := _connected(paths[rank], timeout)) is not None}
        reached: list[list[int]] = _of_all(sorted(peers), group)
        for peer in peers.values():
            peer.sendall(own.to_bytes(4, "little"))
        for _ in range(sum(own in each for each in reached)):
            assert listener is not None, "another rank has reached it"
            peer, _address = listener.accept()
            _prepare(peer, timeout)
            number = bytearray(4)
            fill(peer, memoryview(number))
            peers[int.from_bytes(number, "little")] = peer
    return Reached(dict(sorted(peers.items())), all(len(each) == rank for rank, each in enumerate(reached)))


def _of_all(own: Any, group: dist.ProcessGroup) -> list[Any]:
    found: list[Any] = [None] * group.size()
    dist.all_gather_object(found, own, group=group)
    return found


@contextmanager
def _listening(number: int) -> Iterator[tuple[socket.socket | None, str]]:
    """Listen for a number of connections in a private folder, which is removed at the end.

    Yields:
        The listener and its path; None and "" where there are no Unix sockets.
    """
    found: tuple[socket.socket | None, str] = (None, "")
    if not hasattr(socket, "AF_UNIX"):
        yield found
        return
    with ExitStack() as undo:
        with suppress(OSError):  # such as a full disk, or a temporary folder whose path is too long for a socket
            folder = tempfile.mkdtemp(prefix="autofunc-")
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
            listener, path = undo.enter_context(socket.socket(socket.AF_UNIX)), str(Path(folder) / "s")
            listener.bind(path)
            listener.listen(number)
            found = listener, path
        yield found


def _connected(path: str, timeout: timedelta) -> socket.socket | None:
    """Connect to a listener; return None if it cannot be reached, because it is on another machine or does not exist."""
    if not path:
        return None
    with suppress(OSError), ExitStack() as undo:
        peer = undo.enter_context(socket.socket(socket.AF_UNIX))
        peer.connect(path)
        _prepare(peer, timeout)
        undo.pop_all()
        return peer
    return None


def _prepare(peer: socket.socket, timeout: timedelta) -> None:
    """Set how long reads and writes may block, and ask for large buffers.

    The kernel keeps the time: Python's own timeouts add a system call to each read.
    """
    seconds, rest = divmod(timeout, timedelta(seconds=1))
    limit = struct.pack("ll", seconds, rest // timedelta(microseconds=1))
    peer.setblocking(True)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)


def fill(peer: socket.socket, wanted: memoryview) -> None:
    """Read until all wanted bytes are there.

    Raises:
        OSError: if the connection is closed, or nothing arrives within the socket's timeout.
    """
    while wanted:
        count = peer.recv_into(wanted, 0, socket.MSG_WAITALL)
        if count == 0:
            raise ConnectionError("connection closed")
        wanted = wanted[count:]


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor without conjugate or negative bit."""
    raw: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(raw)

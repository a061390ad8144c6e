"""Unix sockets between processes of one machine: connecting, and tensors as bytes.

gloo hands messages to its own threads, which compete for cores with the ranks that compute and wait. Reading and writing a
socket in the rank's own thread avoids that; the kernel buffers what the other end has not read yet.
"""

from __future__ import annotations

import shutil
import socket
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_BUFFER_BYTES = 1 << 22  # asked for; Linux grants at most net.core.wmem_max


@contextmanager
def listening(number: int) -> Iterator[tuple[socket.socket | None, str]]:
    """Listen for a number of connections in a private folder, which is removed at the end.

    Yields:
        The listener and its path; None and "" where there are no Unix sockets.
    """
    if not hasattr(socket, "AF_UNIX"):
        yield None, ""
        return
    folder = tempfile.mkdtemp(prefix="autofunc-")
    listener = socket.socket(socket.AF_UNIX)
    try:
        path = str(Path(folder) / "s")
        try:
            listener.bind(path)
            listener.listen(number)
        except OSError:  # a temporary folder's path may be too long for a socket
            yield None, ""
        else:
            yield listener, path
    finally:
        listener.close()
        shutil.rmtree(folder, ignore_errors=True)


def connected(path: str) -> socket.socket | None:
    """Connect to a listener; return None if it cannot be reached, because it is on another machine or does not exist."""
    if not path:
        return None
    peer = socket.socket(socket.AF_UNIX)
    try:
        peer.connect(path)
    except OSError:
        peer.close()
        return None
    return peer


def prepare(peer: socket.socket, timeout: timedelta) -> None:
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

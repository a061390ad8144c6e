"""CUDA graphs, and the memory that they share: the only file that captures kernels.

Private parts of torch used, tried with 2.13.0: `torch._C._cuda_clearCublasWorkspaces`, as its own users of CUDA graphs do
(`torch/_inductor/cudagraph_trees.py`).
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch.distributed.device_mesh import DeviceMesh

from autofunc.engine.recordable import INSTEAD
from autofunc.errors import AutofuncError
from autofunc.runtime.tape import Graph


class Graphs(Protocol):
    """Makes graphs that take their memory from one pool, which lasts as long as this or one of them."""

    def __init__(self, device: torch.device) -> None: ...

    @staticmethod
    def is_available() -> bool:
        """Whether this machine has such a device."""
        ...

    def make_room(self) -> None:
        """Before anything is made that is to stay: wait for the device, and give back what is kept for later."""
        ...

    def capturing(self) -> AbstractContextManager[None]:
        """Around the run in which graphs are captured."""
        ...

    def new(self) -> Graph:
        """An empty graph."""
        ...


class CudaGraphs:
    """Makes CUDA graphs.

    Args:
        device: that they run on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._first = _CudaGraph(self._pool)  # a pool whose graphs are all gone cannot be used again
        self._anchor = torch.zeros(1, device=device)
        self.make_room()
        with self.capturing():
            self._first.begin()
            self._anchor.zero_()
            self._first.end()

    @staticmethod
    def is_available() -> bool:
        """See `Graphs.is_available`."""
        return torch.cuda.is_available()

    def make_room(self) -> None:
        """See `Graphs.make_room`: the pool cannot use what the allocator keeps."""
        torch.cuda.synchronize(self._device)
        gc.collect()  # nothing is to be destroyed while kernels are captured
        torch.cuda.empty_cache()

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """See `Graphs.capturing`."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            # workspaces of products that graphs write to come from the pool, and go back to it
            torch._C._cuda_clearCublasWorkspaces()
            try:
                yield
            finally:
                torch._C._cuda_clearCublasWorkspaces()

    def new(self) -> Graph:
        """See `Graphs.new`."""
        return _CudaGraph(self._pool)


class _CudaGraph:
    def __init__(self, pool: Any) -> None:
        self._pool, self._graph = pool, torch.cuda.CUDAGraph()
        self.replay = self._graph.replay

    def begin(self) -> None:
        # other threads may go on: one may read the next batch
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # an action may have nothing to do
            self._graph.capture_end()


KINDS: dict[str, type[Graphs]] = {"cuda": CudaGraphs}
"""By type of the device that can record steps."""


def check_recording(device_type: str, where: str) -> None:
    """Refuse to record steps on a device that cannot.

    Args:
        device_type: such as "cpu".
        where: what is there, for the message.

    Raises:
        AutofuncError: naming what works.
    """
    if device_type not in KINDS:
        raise AutofuncError(f'compile="graphs" records CUDA graphs, and {where} on {device_type}; {INSTEAD}')


def require_graphs(mesh: DeviceMesh | None) -> None:
    """Refuse to record steps where no device can: on the mesh's devices, or without a mesh on this machine.

    Raises:
        AutofuncError: naming what works.
    """
    if mesh is not None:
        check_recording(mesh.device_type, "the mesh is")
    elif not any(kind.is_available() for kind in KINDS.values()):
        raise AutofuncError(f'compile="graphs" records CUDA graphs, and this machine has no GPU; {INSTEAD}')

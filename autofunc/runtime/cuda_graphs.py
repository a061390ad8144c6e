"""CUDA graphs and the memory they share: the only file that captures kernels.

Private parts of torch used, tried with 2.13.0: `torch._C._cuda_clearCublasWorkspaces`, as torch's own users of CUDA graphs
do (`torch/_inductor/cudagraph_trees.py`).
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
    """Creates graphs that share one memory pool, which lives as long as this object or any of them."""

    def __init__(self, device: torch.device) -> None: ...

    @staticmethod
    def is_available() -> bool:
        """Return whether this machine has such a device."""
        ...

    def make_room(self) -> None:
        """Wait for the device and free cached memory, before lasting allocations are made."""
        ...

    def capturing(self) -> AbstractContextManager[None]:
        """Return the context in which to run the step that captures graphs."""
        ...

    def new(self) -> Graph:
        """Return an empty graph."""
        ...


class CudaGraphs:
    """Creates CUDA graphs.

    Args:
        device: that they run on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._first = _CudaGraph(self._pool)  # a pool whose graphs are all gone cannot be reused
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
        """See `Graphs.make_room`: the pool cannot use the allocator's cached blocks."""
        torch.cuda.synchronize(self._device)
        gc.collect()  # no tensor may be destroyed while kernels are captured
        torch.cuda.empty_cache()

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """See `Graphs.capturing`."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            # cuBLAS workspaces that graphs write to come from the pool, and return to it
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
        # other threads continue: one may be reading the next batch
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # an action may launch no kernel
            self._graph.capture_end()


KINDS: dict[str, type[Graphs]] = {"cuda": CudaGraphs}
"""The classes that record steps, by device type."""


def check_recording(device_type: str, where: str) -> None:
    """Refuse to record steps on a device without graphs.

    Args:
        device_type: such as "cpu".
        where: subject and verb for the message, such as "the mesh is".

    Raises:
        AutofuncError: naming what works.
    """
    if device_type not in KINDS:
        raise AutofuncError(f'compile="graphs" records CUDA graphs, and {where} on {device_type}; {INSTEAD}')


def require_graphs(mesh: DeviceMesh | None) -> None:
    """Refuse to record steps if the mesh's devices cannot, or without a mesh if this machine has no suitable device.

    Raises:
        AutofuncError: naming what works.
    """
    if mesh is not None:
        check_recording(mesh.device_type, "the mesh is")
    elif not any(kind.is_available() for kind in KINDS.values()):
        raise AutofuncError(f'compile="graphs" records CUDA graphs, and this machine has no GPU; {INSTEAD}')

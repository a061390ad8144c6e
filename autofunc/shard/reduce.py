"""Summing gradients over data parallel ranks, and over those of the tp axis where each has a part of the sum.

The sums over microbatches are added up as they are, fp32 at least, and not sent back through the gathered parameters, where
they would be rounded first. All gradients of a layer travel together: one reduce-scatter over dp_shard, then, of what is
left, one all-reduce over dp_replicate. Both are started as soon as a layer's last gradient is there.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from autofunc.mesh import axis_group, axis_size, coordinate


def _rows_each(rows: int, size: int) -> int:
    """Rows of the largest part: as `torch.chunk` cuts."""
    return math.ceil(rows / size)


def with_rows(shape: torch.Size) -> torch.Size:
    """The shape in which a parameter is cut along dim 0: one that has no dims is one row."""
    return shape or torch.Size([1])


def shard_shape(shape: torch.Size, size: int, place: int) -> torch.Size:
    """Shape of the part of a parameter that the rank at this place holds."""
    if size == 1:
        return shape
    shape = with_rows(shape)
    each = _rows_each(shape[0], size)
    return torch.Size([max(0, min(each, shape[0] - place * each)), *shape[1:]])


@dataclass
class _Pending:
    """A layer's gradients on their way."""

    work: Any  # None once it is done
    arriving: Tensor
    given: Tensor | None  # must live until then; by place, what each rank gets
    layouts: list[tuple[str, torch.Size, torch.dtype]]  # path, shape of this rank's part, dtype of the sum
    padded: list[int]  # elements of each part in `arriving`

    def wait(self) -> None:
        """Wait until it is done; what it was given is let go of."""
        if self.work is not None:
            self.work.wait()
        self.work = self.given = None


class Reduction:
    """One step's sums over ranks.

    Args:
        mesh: of the pipeline; None or without data parallel axes leaves sums as they are.
        dtype: in what sums travel; None for the sums' own.
    """

    def __init__(self, mesh: DeviceMesh | None, dtype: torch.dtype | None) -> None:
        self._mesh, self._dtype = mesh, dtype
        self._size, self._place = axis_size(mesh, "dp_shard"), coordinate(mesh, "dp_shard")
        self._scattering, self._replicating = axis_group(mesh, "dp_shard"), axis_group(mesh, "dp_replicate")
        self._pending: list[_Pending] = []
        self._sums: dict[str, Tensor] = {}

    def post(self, sums: Mapping[str, Tensor]) -> None:
        """Start to add up the gradients of a layer; their memory may be let go of. So is that of layers that are done.

        Args:
            sums: path of each holder -> its sum over microbatches on this rank.
        """
        for pending in self._pending:  # they end in order; NCCL's say when, gloo's only when they are waited for
            if pending.work is None:
                continue
            if not pending.work.is_completed():
                break
            pending.wait()
        if not sums:
            return
        if self._scattering is None and self._replicating is None:
            self._sums.update(sums)
            return
        dtype = self._dtype or next(iter(sums.values())).dtype
        device = next(iter(sums.values())).device
        if self._size > 1:
            sums = {path: total.view(with_rows(total.shape)) for path, total in sums.items()}
        each = {path: self._padded(total) for path, total in sums.items()}
        given = torch.cat([piece for place in range(self._size) for piece in self._pieces(sums, each, place)]).to(dtype)
        layouts = [(path, shard_shape(total.shape, self._size, self._place), total.dtype) for path, total in sums.items()]
        if self._scattering is not None:
            arriving = torch.empty(sum(each.values()), dtype=dtype, device=device)
            work = dist.reduce_scatter_single(arriving, given, group=self._scattering, async_op=True)
        else:
            arriving = given
            work = dist.all_reduce(arriving, group=self._replicating, async_op=True)
        self._pending.append(_Pending(work, arriving, given, layouts, list(each.values())))

    def finish(self, terms: Container[str]) -> dict[str, Tensor]:
        """Wait for everything: path of each holder -> this rank's part of the sum over all ranks.

        Args:
            terms: paths of holders of whose sums each tp rank has a part.
        """
        for each in self._pending:
            each.wait()
            if self._scattering is not None and self._replicating is not None:
                each.work = dist.all_reduce(each.arriving, group=self._replicating, async_op=True)
        while self._pending:  # the memory of each goes before that of the next is needed
            each = self._pending.pop(0)
            each.wait()
            for part, (path, shape, dtype) in zip(_cut(each.arriving, each.padded), each.layouts, strict=True):
                self._sums[path] = part[: shape.numel()].view(shape).to(dtype)
        sums, self._sums = self._sums, {}
        group = axis_group(self._mesh, "tp")
        parts = [path for path in sums if path in terms]
        if group is not None and parts:
            joined = torch.cat([sums[path].reshape(-1) for path in parts])
            dist.all_reduce(joined, group=group)
            for path, part in zip(parts, _cut(joined, [sums[path].numel() for path in parts]), strict=True):
                sums[path] = part.view(sums[path].shape)
        return sums

    def _pieces(self, sums: Mapping[str, Tensor], padded: Mapping[str, int], place: int) -> Iterator[Tensor]:
        """What the rank at a place gets of some sums, filled up to as many elements as all get."""
        for path, total in sums.items():
            rows = _rows_each(total.shape[0], self._size) if self._size > 1 else None
            part = (total if rows is None else total[place * rows : (place + 1) * rows]).reshape(-1)
            yield part
            if part.numel() < padded[path]:
                yield part.new_zeros(padded[path] - part.numel())

    def _padded(self, total: Tensor) -> int:
        """Elements of the largest part of a sum."""
        if self._size == 1:
            return total.numel()
        return _rows_each(total.shape[0], self._size) * total.shape[1:].numel()


def _cut(joined: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    return torch.split(joined, sizes)

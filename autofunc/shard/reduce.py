"""Summing gradients over data parallel ranks, and over tp ranks if each has a term of the sum.

Sums over microbatches are reduced as they are, at least fp32, not through the gathered parameters, where they would be
rounded first. All gradients of a layer travel together: one reduce-scatter over dp_shard, started as soon as the stage's
last gradient is complete, then one all-reduce of the rest over dp_replicate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from autofunc.mesh import axis_group, axis_size, coordinate
from autofunc.shard.experts import SpreadExperts


def _rows_each(rows: int, size: int) -> int:
    """Return the rows of the largest part, as `torch.chunk` cuts."""
    return math.ceil(rows / size)


def with_rows(shape: torch.Size) -> torch.Size:
    """Return the shape in which a parameter is cut along dim 0: a scalar counts as one row."""
    return shape or torch.Size([1])


def shard_shape(shape: torch.Size, size: int, place: int) -> torch.Size:
    """Return the shape of the part of a parameter that the rank at this place holds."""
    if size == 1:
        return shape
    shape = with_rows(shape)
    each = _rows_each(shape[0], size)
    return torch.Size([max(0, min(each, shape[0] - place * each)), *shape[1:]])


class _Route:
    """The ranks over which some gradients are summed.

    Args:
        mesh: of the pipeline; None or without data parallel axes, sums are not changed.
        axis: the axis whose ranks each get a part of the sum.
    """

    def __init__(self, mesh: DeviceMesh | None, axis: str) -> None:
        self.size, self.place = axis_size(mesh, axis), coordinate(mesh, axis)
        self.scattering, self.replicating = axis_group(mesh, axis), axis_group(mesh, "dp_replicate")


@dataclass
class _Pending:
    """A layer's gradients in transit."""

    work: Any  # None once done
    arriving: Tensor
    given: Tensor | None  # what each rank gets, by place; must live until then
    layouts: list[tuple[str, torch.Size, torch.dtype]]  # path, shape of this rank's part, dtype of the sum
    padded: list[int]  # elements of each part in `arriving`
    route: _Route

    @property
    def goes_on(self) -> bool:
        """True if the parts still have to be summed over dp_replicate."""
        return self.route.scattering is not None and self.route.replicating is not None

    def wait(self) -> None:
        """Wait until it is done, and free its input."""
        if self.work is not None:
            self.work.wait()
        self.work = self.given = None


class Reduction:
    """One step's sums over ranks.

    Args:
        mesh: of the pipeline; None or without data parallel axes, sums are not changed.
        dtype: that sums are sent in; None for their own.
        experts: experts spread over ranks: only the ranks that hold an expert have terms of its sum.
        canonical: maps the path of a holder to that of its parameter.
    """

    def __init__(
        self,
        mesh: DeviceMesh | None,
        dtype: torch.dtype | None,
        experts: SpreadExperts | None = None,
        canonical: Callable[[str], str] = str,
    ) -> None:
        self._mesh, self._dtype, self._experts, self._canonical = mesh, dtype, experts, canonical
        self._route = _Route(mesh, "dp_shard")
        self._route_of_experts = self._route if experts is None else _Route(experts.mesh, "edp")
        self._pending: list[_Pending] = []
        self._sums: dict[str, Tensor] = {}

    def post(self, sums: Mapping[str, Tensor]) -> None:
        """Start to sum the gradients of a layer, whose memory the caller may free; free that of finished layers.

        Args:
            sums: path of each holder -> its sum over microbatches on this rank.
        """
        for pending in self._pending:  # they finish in order; NCCL tells when, gloo only once waited for
            if pending.work is None:
                continue
            if not pending.work.is_completed():
                break
            pending.wait()
        apart = self._experts.paths if self._experts is not None else frozenset()
        own = {path: total for path, total in sums.items() if self._canonical(path) in apart}
        self._post({path: total for path, total in sums.items() if path not in own}, self._route)
        self._post(own, self._route_of_experts)

    def _post(self, sums: Mapping[str, Tensor], route: _Route) -> None:
        if not sums:
            return
        if route.scattering is None and route.replicating is None:
            self._sums.update(sums)
            return
        dtype = self._dtype or next(iter(sums.values())).dtype
        device = next(iter(sums.values())).device
        size = route.size
        if size > 1:
            sums = {path: total.view(with_rows(total.shape)) for path, total in sums.items()}
        each = {path: _padded(total, size) for path, total in sums.items()}
        given = torch.cat([piece for place in range(size) for piece in _pieces(sums, each, place, size)]).to(dtype)
        layouts = [(path, shard_shape(total.shape, size, route.place), total.dtype) for path, total in sums.items()]
        if route.scattering is not None:
            arriving = torch.empty(sum(each.values()), dtype=dtype, device=device)
            work = dist.reduce_scatter_single(arriving, given, group=route.scattering, async_op=True)
        else:
            arriving = given
            work = dist.all_reduce(arriving, group=route.replicating, async_op=True)
        self._pending.append(_Pending(work, arriving, given, layouts, list(each.values()), route))

    def finish(self, terms: Container[str]) -> dict[str, Tensor]:
        """Wait for all sums; return the path of each holder -> this rank's part of the sum over all ranks.

        Args:
            terms: paths of holders of whose sums each tp rank has one term.
        """
        for each in self._pending:
            each.wait()
            if each.goes_on:
                each.work = dist.all_reduce(each.arriving, group=each.route.replicating, async_op=True)
        while self._pending:  # each frees its memory before the next needs its own
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


def _pieces(sums: Mapping[str, Tensor], padded: Mapping[str, int], place: int, size: int) -> Iterator[Tensor]:
    """Yield the parts of sums for the rank at one of `size` places, each padded to the same size on all ranks."""
    for path, total in sums.items():
        rows = _rows_each(total.shape[0], size) if size > 1 else None
        part = (total if rows is None else total[place * rows : (place + 1) * rows]).reshape(-1)
        yield part
        if part.numel() < padded[path]:
            yield part.new_zeros(padded[path] - part.numel())


def _padded(total: Tensor, size: int) -> int:
    """Return the number of elements in the largest part of a sum."""
    return total.numel() if size == 1 else _rows_each(total.shape[0], size) * total.shape[1:].numel()


def _cut(joined: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    return torch.split(joined, sizes)

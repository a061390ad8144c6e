"""Operators that send rows to the ranks that hold their experts, and back; captured stages call them by name.

`dispatch` and `combine` move rows without changing them; each is the gradient of the other. So a layer has two all-to-alls
of rows in its forward and two in its backward, and an all-gather of E counts before the first.

No row is dropped, and no shape depends on the data: a rank's experts may get all rows of all ranks, so they are a tensor of
`ranks * S` rows, S = tokens * k of a microbatch. S of them are real on average; products skip the others, and operators on
single rows, such as activations, compute all. Each value kept between the two exchanges takes
`ranks * S * width * itemsize` bytes.

On the CPU the host reads the counts first, and only real rows are sent. On an accelerator the host must not wait, so each
pair of ranks exchanges S rows, real or not: each rank sends `ranks * S * width * itemsize` bytes.

Ranks along tp hold parts of the same experts and have the same rows: each runs these exchanges with the ranks of its own
tp coordinate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from autofunc.errors import BatchError
from autofunc.graph.exchanges import Wait, at_once, exchanges
from autofunc.shard.expert_rows import Arrived, arrived, own_experts, padded_places, sent


class Peers(Protocol):
    """The ranks that share a layer's experts. Each method begins an exchange and returns a function that waits for it."""

    rank: int
    size: int

    def all_gather(self, x: Tensor) -> Callable[[], Tensor]:
        """Everyone's x, in rank order: (ranks, ...)."""
        ...

    def all_reduce(self, x: Tensor) -> Callable[[], Tensor]:
        """The sum of everyone's x."""
        ...

    def all_to_all(self, x: Tensor, given: list[int] | None, wanted: list[int] | None) -> Callable[[], Tensor]:
        """Send rows to each rank, in rank order, and receive those of each, in rank order.

        Args:
            x: all rows to send, contiguous.
            given: the number for each rank; None: equally many.
            wanted: the number from each rank; None: equally many.
        """
        ...


_peers: WeakValueDictionary[str, Peers] = WeakValueDictionary()  # by name, which a captured graph can hold


def register(name: str, peers: Peers) -> None:
    """Let operators find ranks by name, for as long as the caller holds them."""
    _peers[name] = peers


class GroupPeers:
    """The ranks of a process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank, self.size = group.rank(), group.size()

    def all_gather(self, x: Tensor) -> Callable[[], Tensor]:
        """See `Peers.all_gather`."""
        found = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        x = x.contiguous()
        work = dist.all_gather_single(found, x, group=self._group, async_op=True)
        return _awaited(work, found.view(self.size, *x.shape), x)

    def all_reduce(self, x: Tensor) -> Callable[[], Tensor]:
        """See `Peers.all_reduce`."""
        total = x.clone(memory_format=torch.contiguous_format)
        return _awaited(dist.all_reduce(total, group=self._group, async_op=True), total)

    def all_to_all(self, x: Tensor, given: list[int] | None, wanted: list[int] | None) -> Callable[[], Tensor]:
        """See `Peers.all_to_all`."""
        found = x.new_empty(x.shape[0] if wanted is None else sum(wanted), *x.shape[1:])
        return _awaited(dist.all_to_all_single(found, x, wanted, given, group=self._group, async_op=True), found, x)


def _awaited(work: dist.Work, found: Tensor, *held: Tensor) -> Callable[[], Tensor]:
    """Return a function that waits for an exchange; until then it holds the tensors that the exchange reads."""
    kept = list(held)

    def wait() -> Tensor:
        work.wait()
        kept.clear()
        return found

    return wait


torch.library.define("autofunc::expert_counts", "(Tensor own, str peers, int size) -> Tensor")
torch.library.define("autofunc::expert_sum", "(Tensor x, str peers) -> Tensor")
torch.library.define("autofunc::dispatch", "(Tensor rows, Tensor counts, str peers) -> Tensor")
torch.library.define("autofunc::combine", "(Tensor made, Tensor counts, str peers, int rows) -> Tensor")


# --- how exchanges begin; an operator called directly waits at once


def _begin_counts(own: Tensor, peers: str, size: int) -> Wait:
    return _peers[peers].all_gather(own)


def _begin_sum(x: Tensor, peers: str) -> Wait:
    return _peers[peers].all_reduce(x)


def _begin_dispatch(rows: Tensor, counts: Tensor, peers: str) -> Wait:
    group, number = _peers[peers], rows.shape[0]
    exact = _is_exact(rows)
    if exact:
        _check_counts(counts, number)
        coming = group.all_to_all(
            rows.contiguous(), sent(counts, group.rank).tolist(), own_experts(counts, group.rank).sum(1).tolist()
        )
    else:
        buffer = rows.new_zeros(group.size * number, rows.shape[1])
        coming = group.all_to_all(buffer.index_copy_(0, padded_places(counts, group.rank, number), rows), None, None)
    found = arrived(counts, group.rank, number, padded=not exact)

    def wait() -> Tensor:
        came = coming()
        if exact:
            made = came.new_zeros(group.size * number, came.shape[1])
            torch.index_select(came, 0, found.source[: len(came)], out=made[: len(came)])
            return made
        return came.index_select(0, _inside(found)).masked_fill_(~found.is_real[:, None], 0)

    return wait


def _begin_combine(made: Tensor, counts: Tensor, peers: str, rows: int) -> Wait:
    group = _peers[peers]
    if _is_exact(made):
        _check_counts(counts, rows)
        came = own_experts(counts, group.rank).sum(1).tolist()
        source = arrived(counts, group.rank, rows, padded=False).source[: sum(came)]
        buffer = made.new_empty(sum(came), made.shape[1]).index_copy_(0, source, made[: sum(came)])
        return group.all_to_all(buffer, came, sent(counts, group.rank).tolist())
    found = arrived(counts, group.rank, rows, padded=True)
    spare = group.size * rows  # one extra row takes those that nobody sent
    buffer = made.new_zeros(spare + 1, made.shape[1])
    buffer.index_copy_(0, found.source.where(found.is_real, spare), made)
    coming = group.all_to_all(buffer[:spare], None, None)
    return lambda: coming().index_select(0, padded_places(counts, group.rank, rows))


_BEGUN_BY: dict[str, Callable[..., Wait]] = {
    "expert_counts": _begin_counts, "expert_sum": _begin_sum, "dispatch": _begin_dispatch, "combine": _begin_combine,
}  # fmt: skip


for _name, _begin in _BEGUN_BY.items():
    torch.library.impl(f"autofunc::{_name}", "CompositeExplicitAutograd", at_once(_begin))
    exchanges(getattr(torch.ops.autofunc, _name).default, _begin)


def _is_exact(rows: Tensor) -> bool:
    """Return whether the host may read the counts."""
    return rows.device.type == "cpu"


def _inside(found: Arrived) -> Tensor:
    return found.source.where(found.is_real, 0)


def _check_counts(counts: Tensor, rows: int) -> None:
    each = counts.sum(1).tolist()
    if any(number != rows for number in each):
        raise BatchError(
            f"ranks that share experts have {', '.join(map(str, each))} pairs of a token and an expert in a microbatch; "
            "expected equal numbers: give all of them microbatches of one shape"
        )


torch.library.register_fake("autofunc::expert_counts", lambda own, peers, size: own.new_empty(size, own.shape[0]))
torch.library.register_fake("autofunc::expert_sum", lambda x, peers: x.new_empty(x.shape))
torch.library.register_fake(
    "autofunc::dispatch", lambda rows, counts, peers: rows.new_empty(counts.shape[0] * rows.shape[0], rows.shape[1])
)
torch.library.register_fake(
    "autofunc::combine", lambda made, counts, peers, rows: made.new_empty(rows, made.shape[1])
)  # fmt: skip


def _keep_sum(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.peers = inputs[1]


def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    """Sum cotangents: the loss is a sum over all ranks, each of which read the sum."""
    return torch.ops.autofunc.expert_sum(grad, ctx.peers), None


def _keep_dispatch(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.rows, ctx.peers = inputs[0].shape[0], inputs[2]
    ctx.save_for_backward(inputs[1])


def _keep_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.peers = inputs[2]
    ctx.save_for_backward(inputs[1])


def _dispatch_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.autofunc.combine(grad, ctx.saved_tensors[0], ctx.peers, ctx.rows), None, None


def _combine_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return torch.ops.autofunc.dispatch(grad, ctx.saved_tensors[0], ctx.peers), None, None, None


torch.library.register_autograd("autofunc::expert_sum", _sum_backward, setup_context=_keep_sum)
torch.library.register_autograd("autofunc::dispatch", _dispatch_backward, setup_context=_keep_dispatch)
torch.library.register_autograd("autofunc::combine", _combine_backward, setup_context=_keep_combine)

"""The end of a step: tied sums are exchanged, the loss reaches every rank, gradients are divided by the total weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from autofunc.errors import BatchError
from autofunc.losses import Loss
from autofunc.runtime.program import Layout
from autofunc.runtime.ties import Tie, tie_name
from autofunc.runtime.transport import Ticket, Transport


def exchange_ties(
    rank: int, sums: dict[str, Tensor], ties: Sequence[Tie], transport: Transport, device: torch.device
) -> Iterator[None]:
    """Replace the sums of the holders of each tied parameter by their total, in path order, under the canonical path.

    Args:
        rank: this pp rank.
        sums: path of each local holder -> its sum; changed in place.
        ties: all ties of the model.
        transport: how sums reach the other ranks that hold the parameter.
        device: where the sums are.
    """
    posted: list[tuple[Tie, list[Ticket], dict[str, Ticket]]] = []
    for tie in ties:
        if rank not in tie.ranks():
            continue
        # receives first: with zero buffering a send completes only once its receive is posted
        incoming = {
            channel.name: transport.open(channel).receive(empty(channel.layouts, device))
            for channel in tie.channels
            if channel.target == rank
        }
        outgoing = [
            transport.open(channel).send([sums[path]])
            for path, owner in tie.holders
            if owner == rank
            for channel in tie.channels
            if channel.source == rank and channel.name == tie_name(path, channel.target)
        ]
        posted.append((tie, outgoing, incoming))
    for tie, outgoing, incoming in posted:
        total: Tensor | None = None
        for path, owner in tie.holders:
            if owner == rank:
                part = sums.pop(path)
            else:
                ticket = incoming[tie_name(path, rank)]
                while not ticket.arrived():
                    yield
                part = ticket.tensors[0]
            total = part if total is None else total + part
        for ticket in outgoing:
            ticket.settle()
        assert total is not None
        sums[tie.path] = total


def total_loss(sums: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """[sum of sums, sum of weights], added up in microbatch order: fp32, shape (2,).

    Args:
        sums: of the loss of each microbatch, 0-dim.
        weights: of each microbatch, 0-dim.
    """
    total, weight = sums[0].float(), weights[0].float()
    for index in range(1, len(sums)):
        total, weight = total + sums[index].float(), weight + weights[index]
    return torch.stack((total, weight))


def share(
    rank: int, root: int, make: Callable[[], list[Tensor]], like: Sequence[Layout],
    device: torch.device, transport: Transport, into: list[Tensor],
) -> Iterator[None]:  # fmt: skip
    """Give tensors that the root makes to all pp ranks; `like` describes them to the others. Appends them to `into`."""
    tensors = make() if rank == root else empty(like, device)
    ticket = transport.broadcast(root, tensors)
    while not ticket.arrived():
        yield
    into += ticket.tensors


def empty(layouts: Sequence[Layout], device: torch.device) -> list[Tensor]:
    """Memory for what will be received. It holds ones, so that a group that moves nothing ("fake") lets a step end."""
    return [torch.ones(shape, dtype=dtype, device=device) for shape, dtype in layouts]


def divisor(weight: Tensor, loss: Loss | None) -> Tensor:
    """The total weight of a loss, as sums are divided by it; 1 instead of 0 where a loss may weigh nothing.

    Raises:
        BatchError: when it is 0, and may not be.
    """
    if getattr(loss, "may_weigh_nothing", False):
        return torch.where(weight == 0, 1.0, weight)
    if weight.item() == 0.0:
        raise BatchError("the total weight of the loss is 0: no microbatch has a label to learn from (all are -100?)")
    return weight


def divide(sums: Mapping[str, Tensor], weight: Tensor, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Gradients of the mean loss: each sum divided by the total weight, in the parameter's dtype.

    Args:
        sums: by path, of all microbatches and data parallel ranks.
        weight: total weight of the loss, 0-dim fp32.
        dtypes: by path, of the parameters.
    """
    return {path: (total / weight).to(dtypes[path]) for path, total in sums.items()}

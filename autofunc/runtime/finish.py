"""The end of a step: tied sums are exchanged, the loss reaches every rank, gradients are divided by the total weight.

Private parts of torch used, tried with 2.13.0: `torch._foreach_div_`, one kernel for many tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from autofunc.errors import ModelError
from autofunc.losses import Loss
from autofunc.runtime.fixed import copy_all
from autofunc.runtime.program import Layout
from autofunc.runtime.ties import Tie
from autofunc.runtime.transport import Ticket, Transport


def exchange_ties(
    rank: int, sums: dict[str, Tensor], ties: Sequence[Tie], transport: Transport, device: torch.device
) -> Iterator[None]:
    """Replace the sums of the holders of each tied parameter by their total, in path order, under the canonical path.

    Args:
        rank: this pp rank.
        sums: path of each local holder -> its sum; changed in place.
        ties: all ties of the model.
        transport: to the other ranks that hold the parameter.
        device: of the sums.
    """
    posted: list[tuple[Tie, list[Ticket], dict[str, Ticket]]] = []
    for tie in ties:
        if rank not in tie.ranks():
            continue
        # receives first: with zero buffering a send completes only once its receive is posted
        incoming = {
            path: transport.open(channel).receive(empty([tie.layout], device))
            for path, channel in tie.transfers()
            if channel.target == rank
        }
        outgoing = [
            transport.open(channel).send([sums[path]]) for path, channel in tie.transfers() if channel.source == rank
        ]
        posted.append((tie, outgoing, incoming))
    for tie, outgoing, incoming in posted:
        total: Tensor | None = None
        for path, owner in tie.holders:
            if owner == rank:
                part = sums.pop(path)
            else:
                ticket = incoming[path]
                while not ticket.arrived():
                    yield
                part = ticket.tensors[0]
            total = part if total is None else total + part
        for ticket in outgoing:
            ticket.settle()
        assert total is not None
        sums[tie.path] = total


def total_loss(sums: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Return [sum of sums, sum of weights], accumulated in fp32 in microbatch order, shape (2,).

    Args:
        sums: of each microbatch's loss, 0-dim.
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
    """Broadcast the tensors that the root makes to all pp ranks, and append them to `into`; `like` gives their layouts.

    Raises:
        ModelError: on the root, if it makes others: the other ranks receive what was inferred when the step was planned.
    """
    if rank == root:
        tensors = make()
        made = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        if made != [*like]:
            raise ModelError(f"the last stage ends in {made}; when the step was planned, it ended in {[*like]}")
    else:
        tensors = empty(like, device)
    ticket = transport.broadcast(root, tensors)
    while not ticket.arrived():
        yield
    into += ticket.tensors


def empty(layouts: Sequence[Layout], device: torch.device) -> list[Tensor]:
    """Return memory to receive into. It holds ones, so that a step completes on a group that moves nothing ("fake")."""
    return [torch.ones(shape, dtype=dtype, device=device) for shape, dtype in layouts]


def may_weigh_nothing(loss: Loss | None) -> bool:
    """Return whether a step whose total weight is 0 is valid, with a loss of 0."""
    return bool(getattr(loss, "may_weigh_nothing", False))


def mean(total: Tensor, weight: Tensor, loss: Loss | None) -> Tensor:
    """Return a step's loss from its sum and weight, 0-dim; NaN if the weight is 0 and the loss does not allow that."""
    return total / divisor(weight) if may_weigh_nothing(loss) else total / weight


def divisor(weight: Tensor) -> Tensor:
    """Return the divisor of gradient sums: the loss's total weight, or 1 if that is 0, where the sums are 0 anyway."""
    return torch.where(weight == 0, 1.0, weight)


def divide(
    sums: dict[str, Tensor], weight: Tensor, dtypes: Mapping[str, torch.dtype], *, lasting: bool = False
) -> dict[str, Tensor]:
    """Return gradients of the mean loss: each sum divided by the total weight, in the parameter's dtype.

    Args:
        sums: by path, over all microbatches and data parallel ranks. They become the gradients, in the same memory if the
            dtype is the same, and the dict is emptied, so that there is never a second set.
        weight: total weight of the loss, 0-dim fp32.
        dtypes: of the parameters, by path.
        lasting: True if the next step uses the sums' memory, so that gradients need their own.
    """
    totals, paths = list(sums.values()), list(sums)
    sums.clear()
    if totals:
        torch._foreach_div_(totals, weight)
    if lasting:
        grads = [torch.empty_like(total, dtype=dtypes[path]) for path, total in zip(paths, totals, strict=True)]
        copy_all(totals, grads)
        return dict(zip(paths, grads, strict=True))
    totals.reverse()  # frees each sum as soon as its gradient exists
    return {path: totals.pop().to(dtypes[path]) for path in paths}

"""Normalisation by statistics over tokens that are cut: sums over all ranks, so that each keeps the same running ones."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from autofunc.captured.state import synchronised_batch_norm
from autofunc.context_parallel.axis import ContextAxis
from autofunc.context_parallel.moves import added_up
from autofunc.context_parallel.rules import rule
from autofunc.spread import summing
from autofunc.spreading import FULL, Operation, Outcome, Want

_aten = torch.ops.aten


@rule(_aten.batch_norm, _aten._native_batch_norm_legit_functional)
def batch_norm(op: Operation, axis: ContextAxis) -> Outcome | None:
    """Of (rows, features, tokens) or (tokens, features): by statistics of all tokens, or by the running ones."""
    x, training = op.given["input"], op.given["training"]
    cut, makes_several = op.cut(x), op.node.target is _aten._native_batch_norm_legit_functional.default
    if cut is None or cut.dim == 1 or (training and not makes_several):
        return None
    layout = (cut, FULL, FULL, FULL, FULL) if makes_several else cut
    if not training:
        return op.becomes(layout, input=Want(x, cut))
    given = (op.given[name] for name in ("weight", "bias", "running_mean", "running_var", "momentum", "eps"))
    return Outcome(layout, batch_norm_of_tokens, (Want(x, cut), *given, axis.size, axis.ranks))


def batch_norm_of_tokens(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, momentum: float, eps: float,
    size: int, ranks: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Normalise this rank's tokens by the statistics of all of them; returns what `synchronised_batch_norm` does."""
    with summing(_TokenSum(size, ranks)):
        return synchronised_batch_norm(x, weight, bias, mean, variance, True, momentum, eps)


@dataclass(frozen=True)
class _TokenSum:
    """A `spread.DataSum` over the ranks that have other tokens of the same rows."""

    size: int
    ranks: str

    @property
    def fingerprint(self) -> Hashable:
        """See `DataSum.fingerprint`."""
        return self.ranks

    def sum(self, x: Tensor) -> Tensor:
        """See `DataSum.sum`."""
        return added_up(x, self.ranks)

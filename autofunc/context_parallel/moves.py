"""Moves from one layout of tokens to another, as differentiable operators: all that cp ranks exchange apart from attention.

The loss is a sum over ranks, and each rank differentiates its own uses. So for a value that all ranks have, each rank has
one term of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from autofunc.context_parallel.ranks import ranks_of
from autofunc.context_parallel.token_chunks import in_order, own_part, spread_out
from autofunc.graph.exchanges import exchanges

_PART = "Tensor x, int dim, int[] parts, str ranks"
for _name, _arguments in {
    "own_tokens": _PART, "own_tokens_backward": _PART, "all_tokens": _PART, "all_tokens_backward": _PART,
    "one_token": "Tensor x, int dim, int index, str ranks",
    "one_token_backward": "Tensor x, int dim, int index, int each, str ranks",
    "added_up": "Tensor x, str ranks", "on_first": "Tensor x, str ranks",
}.items():  # fmt: skip
    torch.library.define(f"autofunc::{_name}", f"({_arguments}) -> Tensor")


def own_tokens(x: Tensor, dim: int, parts: Sequence[int], ranks: str) -> Tensor:
    """Cut this rank's tokens from a value that all ranks have.

    Args:
        x: the whole value.
        dim: the tokens' dim.
        parts: lengths of the sequences that follow one another along `dim`, each of which is cut.
        ranks: the name of the ranks, see `ranks.known_as`.
    """
    return _call("own_tokens", x, dim, parts, ranks)


def all_tokens(x: Tensor, dim: int, parts: Sequence[int], ranks: str) -> Tensor:
    """Gather the whole of a value of which each rank has its tokens; arguments as for `own_tokens`."""
    return _call("all_tokens", x, dim, parts, ranks)


def added_up(x: Tensor, ranks: str) -> Tensor:
    """Sum the terms of all ranks."""
    made: Tensor = torch.ops.autofunc.added_up(x, ranks)
    return made


def on_first(x: Tensor, ranks: str) -> Tensor:
    """Turn a value that all ranks have into terms of a sum: the value itself on the first rank, zeros on the others."""
    made: Tensor = torch.ops.autofunc.on_first(x, ranks)
    return made


def one_token(x: Tensor, dim: int, index: int, ranks: str) -> Tensor:
    """Take one token of the whole sequence as a term of a sum: the token on the rank that has it, zeros on the others.

    Args:
        x: this rank's tokens.
        dim: the tokens' dim, which the result lacks.
        index: the token's position in the whole sequence, from 0.
        ranks: as for `own_tokens`.
    """
    made: Tensor = torch.ops.autofunc.one_token(x, dim, index, ranks)
    return made


def _call(name: str, x: Tensor, dim: int, parts: Sequence[int], ranks: str) -> Tensor:
    made: Tensor = getattr(torch.ops.autofunc, name)(x, dim, list(parts), ranks)
    return made


# --- implementations


def _per_sequence(x: Tensor, dim: int, lengths: Sequence[int], function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function to each of several sequences along a dim; equally long ones, the usual case, all at once."""
    if len(set(lengths)) == 1:
        apart = x.reshape(*x.shape[:dim], len(lengths), lengths[0], *x.shape[dim + 1 :])
        made = function(apart.movedim(dim, 0)).movedim(0, dim)  # each sequence still has its tokens in the same dim
        return made.reshape(*x.shape[:dim], -1, *x.shape[dim + 1 :])
    pieces = [function(piece[None])[0] for piece in torch.split(x, list(lengths), dim)]
    return torch.cat(pieces, dim)


@torch.library.impl("autofunc::own_tokens", "CompositeExplicitAutograd")
def _own(x: Tensor, dim: int, parts: Sequence[int], ranks: str) -> Tensor:
    group = ranks_of(ranks)
    return _per_sequence(x, dim, parts, lambda one: own_part(one, dim + 1, group.rank, group.size)).contiguous()


@torch.library.impl("autofunc::own_tokens_backward", "CompositeExplicitAutograd")
def _own_backward(x: Tensor, dim: int, parts: Sequence[int], ranks: str) -> Tensor:
    group = ranks_of(ranks)
    local = [part // group.size for part in parts]
    return _per_sequence(x, dim, local, lambda one: spread_out(one, dim + 1, group.rank, group.size)).contiguous()


@torch.library.impl("autofunc::all_tokens", "CompositeExplicitAutograd")
def _all(x: Tensor, dim: int, parts: Sequence[int], ranks: str) -> Tensor:
    group = ranks_of(ranks)
    found = torch.stack(group.gather(x))  # (ranks, ...): each has its rank's part of every sequence
    local = [part // group.size for part in parts]
    whole = [in_order(list(each), dim) for each in torch.split(found, local, dim + 1)]
    return torch.cat(whole, dim)


@torch.library.impl("autofunc::all_tokens_backward", "CompositeExplicitAutograd")
def _all_backward(x: Tensor, dim: int, parts: Sequence[int], ranks: str) -> Tensor:
    group = ranks_of(ranks)
    pieces = [
        _per_sequence(x, dim, parts, lambda one, rank=rank: own_part(one, dim + 1, rank, group.size)).contiguous()  # type: ignore[misc]
        for rank in range(group.size)
    ]
    return group.reduce_scatter(pieces)


@torch.library.impl("autofunc::added_up", "CompositeExplicitAutograd")
def _added_up(x: Tensor, ranks: str) -> Tensor:
    first, *others = ranks_of(ranks).gather(x)
    total = first.clone() if not others else first
    for other in others:
        total = total + other
    return total.view(x.shape)


@torch.library.impl("autofunc::on_first", "CompositeExplicitAutograd")
def _on_first(x: Tensor, ranks: str) -> Tensor:
    return x.contiguous().clone() if ranks_of(ranks).rank == 0 else x.new_zeros(x.shape)


def _place(index: int, each: int, ranks: str) -> int | None:
    """Return a token's place among this rank's two chunks of `each` tokens; None if another rank has it."""
    group = ranks_of(ranks)
    chunk, place = divmod(index, each)
    if chunk == group.rank:
        return place
    return each + place if chunk == 2 * group.size - 1 - group.rank else None


@torch.library.impl("autofunc::one_token", "CompositeExplicitAutograd")
def _one(x: Tensor, dim: int, index: int, ranks: str) -> Tensor:
    place = _place(index, x.shape[dim] // 2, ranks)
    found = x.select(dim, 0 if place is None else place)
    return torch.zeros_like(found) if place is None else found.clone(memory_format=torch.contiguous_format)


@torch.library.impl("autofunc::one_token_backward", "CompositeExplicitAutograd")
def _one_backward(x: Tensor, dim: int, index: int, each: int, ranks: str) -> Tensor:
    made = x.new_zeros((*x.shape[:dim], 2 * each, *x.shape[dim:]))
    place = _place(index, each, ranks)
    if place is not None:
        made.select(dim, place).copy_(x)
    return made


# --- shapes and gradients


def _along(x: Tensor, dim: int, size: int) -> Tensor:
    return x.new_empty((*x.shape[:dim], size, *x.shape[dim + 1 :]))


def _fake_own(x: Tensor, dim: int, parts: Sequence[int], ranks: str) -> Tensor:
    return _along(x, dim, sum(parts) // ranks_of(ranks).size)


def _fake_all(x: Tensor, dim: int, parts: Sequence[int], ranks: str) -> Tensor:
    return _along(x, dim, sum(parts))


torch.library.register_fake("autofunc::own_tokens", _fake_own)
torch.library.register_fake("autofunc::all_tokens_backward", _fake_own)
torch.library.register_fake("autofunc::own_tokens_backward", _fake_all)
torch.library.register_fake("autofunc::all_tokens", _fake_all)
torch.library.register_fake("autofunc::added_up", lambda x, ranks: x.new_empty(x.shape))
torch.library.register_fake("autofunc::on_first", lambda x, ranks: x.new_empty(x.shape))
torch.library.register_fake(
    "autofunc::one_token", lambda x, dim, index, ranks: x.new_empty((*x.shape[:dim], *x.shape[dim + 1 :]))
)
torch.library.register_fake(
    "autofunc::one_token_backward",
    lambda x, dim, index, each, ranks: x.new_empty((*x.shape[:dim], 2 * each, *x.shape[dim:])),
)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.given = inputs[1:]
    ctx.each = inputs[0].shape[inputs[1]] // 2 if isinstance(inputs[1], int) else 0


def _differentiated_by(name: str, forward: str) -> None:
    """Register the operator `name`, which takes the same arguments, as the gradient of `forward`."""

    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        return getattr(torch.ops.autofunc, name)(cotangent, *ctx.given), *[None] * len(ctx.given)

    torch.library.register_autograd(f"autofunc::{forward}", backward, setup_context=_remember)


def _of_one_token(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
    dim, index, ranks = ctx.given
    return torch.ops.autofunc.one_token_backward(cotangent, dim, index, ctx.each, ranks), None, None, None


_differentiated_by("own_tokens_backward", "own_tokens")
_differentiated_by("all_tokens_backward", "all_tokens")
_differentiated_by("added_up", "added_up")
_differentiated_by("on_first", "on_first")
torch.library.register_autograd("autofunc::one_token", _of_one_token, setup_context=_remember)
for _name in ("all_tokens", "all_tokens_backward", "added_up"):
    exchanges(getattr(torch.ops.autofunc, _name).default)

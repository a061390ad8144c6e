"""Attention over tokens cut over context parallel ranks: one operator, and one for its gradients.

Each rank has the queries of its own tokens. It gets the other ranks' keys and values either all at once ("allgather") or
one rank at a time ("ring"), computing with one rank's while the next rank's arrive; partial outputs are merged by their
log-sum-exp. The backward fetches keys and values again, so only local tensors are kept. The graph is the same on all ranks:
which chunks belong to which rank is looked up inside the operators.

Source: Liu et al., "Ring Attention with Blockwise Transformers", arXiv 2310.01889; chunks as in `token_chunks`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autofunc.context_parallel.attention_blocks import Gradients, additive, block, block_backward, exact, merge
from autofunc.context_parallel.ranks import ContextRanks, ranks_of
from autofunc.context_parallel.token_chunks import in_order, own_part
from autofunc.errors import ModelError, one_of
from autofunc.graph.exchanges import exchanges

METHODS = ("allgather", "ring")

_ARGUMENTS = "Tensor query, Tensor key, Tensor value, Tensor? mask"
_OPTIONS = "bool is_causal, float scale, str ranks, str method"
torch.library.define("autofunc::context_attention", f"({_ARGUMENTS}, {_OPTIONS}) -> (Tensor, Tensor)")
torch.library.define(
    "autofunc::context_attention_backward",
    f"(Tensor cotangent, {_ARGUMENTS}, Tensor output, Tensor total, {_OPTIONS}, bool of_mask) -> Tensor[]",
)


def check_method(method: str) -> None:
    """Refuse an unknown method.

    Raises:
        ModelError: naming the methods there are.
    """
    if method not in METHODS:
        raise ModelError(f"context parallel method {method!r} is unknown; {one_of(method, METHODS)}")


def context_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, is_causal: bool = False,
    scale: float | None = None, ranks: str, method: str = "allgather",
) -> Tensor:  # fmt: skip
    """Compute `scaled_dot_product_attention` for this rank's tokens; differentiable. All ranks call it.

    Args:
        query: (..., N, T / cp, H): this rank's tokens, N heads.
        key: (..., K, T / cp, H), also of this rank's tokens; K divides N.
        value: (..., K, T / cp, H').
        mask: bool, or floating point and added to the scores; this rank's queries by all keys: broadcasts to
            (..., N, T / cp, T).
        is_causal: each token sees itself and those before it in the whole sequence; excludes a mask.
        scale: factor of the scores; 1 / sqrt(H) by default.
        ranks: the name of the ranks, see `ranks.known_as`.
        method: "allgather" or "ring".

    Returns:
        (..., N, T / cp, H'), in the queries' dtype; sums over blocks are taken in fp32 at least.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    leading = query.shape[:-3] if query.dim() > 3 else ()
    if mask is not None:
        mask = mask.view(*[1] * (query.dim() - mask.dim()), *mask.shape)
        if query.dim() > 4:
            mask = mask.expand(*leading, *mask.shape[-3:])
    four = [_with_four_dims(each) for each in (query, key, value)]
    output, _ = torch.ops.autofunc.context_attention(
        *four, None if mask is None else _with_four_dims(mask), is_causal, scale, ranks, method
    )
    result: Tensor = output.reshape(*query.shape[:-1], value.shape[-1])
    return result


def _with_four_dims(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[-3:]) if x.dim() >= 3 else x[None, None]


class _Part(NamedTuple):
    """Which of this rank's queries attend to which keys of one rank: slices of both along the tokens."""

    queries: slice
    keys: slice
    is_diagonal: bool


def parts(rank: int, source: int, tokens: int, *, is_causal: bool) -> _Part:
    """Return which of a rank's `tokens` queries see which of another rank's keys: under a causal mask, half of the pairs.

    A rank's first chunk comes before every rank's second, so both chunks of a source are either earlier or later.
    """
    first, second, both = slice(0, tokens // 2), slice(tokens // 2, None), slice(None)
    if not is_causal or source == rank:
        return _Part(both, both, is_causal)
    return _Part(both, first, False) if source < rank else _Part(second, both, False)


@torch.library.impl("autofunc::context_attention", "CompositeExplicitAutograd")
def _forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float, ranks: str, method: str
) -> tuple[Tensor, Tensor]:  # fmt: skip
    group, tokens, dtype = ranks_of(ranks), query.shape[2], exact(query.dtype)
    output = _by_tokens(query, value.shape[-1], dtype).zero_()
    total = torch.full(query.shape[:-1], float("-inf"), dtype=dtype, device=query.device)
    for source, keys, values in _arriving(group, key, value, method):
        part = parts(group.rank, source, tokens, is_causal=is_causal)
        found, its_total = block(
            query[:, :, part.queries], keys[:, :, part.keys], values[:, :, part.keys],
            _of_source(mask, source, group.size, query.dtype), part.is_diagonal, scale,
        )  # fmt: skip
        merge(output[:, :, part.queries], total[:, :, part.queries], found, its_total)
    return output.to(query.dtype), total


@torch.library.impl("autofunc::context_attention_backward", "CompositeExplicitAutograd")
def _gradients(
    cotangent: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, output: Tensor, total: Tensor,
    is_causal: bool, scale: float, ranks: str, method: str, of_mask: bool,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of queries, keys, values and, if wanted, the mask."""
    group, tokens, dtype = ranks_of(ranks), query.shape[2], exact(query.dtype)
    cotangent = cotangent.contiguous()
    by_query = torch.zeros(query.shape, dtype=dtype, device=query.device)
    by_mask: list[Tensor] = [cotangent.new_empty(0)] * group.size

    def of(source: int, keys: Tensor, values: Tensor) -> Tensor:
        """Compute the gradients of one rank's keys and values, joined."""
        part = parts(group.rank, source, tokens, is_causal=is_causal)
        rows = (slice(None), slice(None), part.queries)
        found: Gradients = block_backward(
            cotangent[rows], query[rows], keys[:, :, part.keys], values[:, :, part.keys],
            _of_source(mask, source, group.size, query.dtype), output[rows], total[rows], part.is_diagonal, scale,
            of_mask=of_mask,
        )  # fmt: skip
        by_query[rows] += found.query
        if found.mask is not None:
            by_mask[source] = found.mask
        whole = [torch.zeros(each.shape, dtype=dtype, device=each.device) for each in (keys, values)]
        for each, gradient in zip(whole, (found.key, found.value), strict=True):
            each[:, :, part.keys] = gradient.to(dtype)
        return _joined(*whole)

    if method == "ring":
        own = _sent_along(group, key, value, of)
    else:
        each = {source: of(source, keys, values) for source, keys, values in _arriving(group, key, value, method)}
        own = group.reduce_scatter([each[source] for source in range(group.size)])
    each_own = by_query, *_apart(own, key, value)
    found = [_by_tokens(x, x.shape[-1], query.dtype).copy_(x) for x in each_own]
    return [*found, _of_mask(by_mask, mask).to(query.dtype).contiguous()] if of_mask and mask is not None else found


def _by_tokens(x: Tensor, features: int, dtype: torch.dtype) -> Tensor:
    """Allocate (B, N, T, features) with a token's heads adjacent in memory, as projections around attention have them."""
    rows, heads, tokens, _ = x.shape
    return torch.empty((rows, tokens, heads, features), dtype=dtype, device=x.device).transpose(1, 2)


def _arriving(group: ContextRanks, key: Tensor, value: Tensor, method: str) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield every rank with its keys and values, as they arrive."""
    joined = _joined(key, value)
    if method == "allgather":
        for source, found in enumerate(group.gather(joined)):
            yield source, *_apart(found, key, value)
        return
    for step in range(group.size):
        wait = group.rotate(joined) if step < group.size - 1 else None
        yield (group.rank - step) % group.size, *_apart(joined, key, value)
        if wait is not None:
            joined = wait()


def _sent_along(
    group: ContextRanks, key: Tensor, value: Tensor, gradients: Callable[[int, Tensor, Tensor], Tensor]
) -> Tensor:
    """Send each rank's sum of gradients around the ring, one step behind its keys and values, until it is home."""
    arriving: Callable[[], Tensor] | None = None
    for source, keys, values in _arriving(group, key, value, "ring"):
        total = gradients(source, keys, values)
        if arriving is not None:
            total += arriving()
        arriving = group.rotate(total)
    assert arriving is not None, "there is one rank at least"
    return arriving()


def _joined(key: Tensor, value: Tensor) -> Tensor:
    """Flatten both into one tensor, so that one exchange carries them."""
    return torch.cat([key.reshape(-1), value.reshape(-1)])


def _apart(joined: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    keys, values = torch.split(joined, [key.numel(), value.numel()])
    return keys.view(key.shape), values.view(value.shape)


def _of_source(mask: Tensor | None, source: int, size: int, dtype: torch.dtype) -> Tensor | None:
    """Return the term added to the scores of one rank's keys."""
    if mask is None:
        return None
    return additive(mask if mask.shape[-1] == 1 else own_part(mask, -1, source, size), dtype)


def _of_mask(each: list[Tensor], mask: Tensor) -> Tensor:
    """Assemble the gradient of a mask from those of each rank's keys."""
    return in_order(each, -1).sum_to_size(mask.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.is_causal, ctx.scale, ctx.ranks, ctx.method = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, cotangent: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if cotangent is None:
        return (None,) * 8
    of_mask = ctx.needs_input_grad[3]
    found = torch.ops.autofunc.context_attention_backward(
        cotangent, *ctx.saved_tensors, ctx.is_causal, ctx.scale, ctx.ranks, ctx.method, of_mask
    )
    return (*found[:3], found[3] if of_mask else None, None, None, None, None)


def _fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    output = _by_tokens(query, value.shape[-1], query.dtype)
    return output, query.new_empty(query.shape[:-1], dtype=exact(query.dtype))


def _fake_gradients(
    cotangent: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *rest: Any
) -> list[Tensor]:  # fmt: skip
    found = [_by_tokens(x, x.shape[-1], query.dtype) for x in (query, key, value)]
    return [*found, query.new_empty(mask.shape)] if rest[-1] and mask is not None else found


torch.library.register_fake("autofunc::context_attention", _fake)
torch.library.register_fake("autofunc::context_attention_backward", _fake_gradients)
torch.library.register_autograd("autofunc::context_attention", _backward, setup_context=_keep)
exchanges(torch.ops.autofunc.context_attention.default)
exchanges(torch.ops.autofunc.context_attention_backward.default)

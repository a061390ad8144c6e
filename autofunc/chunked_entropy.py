"""Cross-entropy without whole logits: one operator computes, uses and frees the logits of a chunk of rows at a time.

It is a single operator, so a captured stage keeps no logits between its pieces: the backward recomputes them chunk by
chunk, and returns the gradients of hidden states and weight from the same pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_ARGUMENTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int ignored, int num_chunks"
torch.library.define("autofunc::chunked_entropy", f"({_ARGUMENTS}) -> Tensor")
torch.library.define("autofunc::chunked_entropy_backward", f"(Tensor grad, {_ARGUMENTS}, bool[] wanted) -> Tensor[]")


def chunked_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignored: int, num_chunks: int
) -> Tensor:  # fmt: skip
    """Return the summed cross-entropy of `linear(hidden, weight, bias)`, in nats: 0-dim, computed in fp32 or wider.

    Args:
        hidden: (rows, features).
        weight: (classes, features).
        bias: (classes,).
        labels: int64, (rows,).
        ignored: label of rows that do not count.
        num_chunks: number of pieces to cut the rows into; one has its logits at a time.
    """
    made: Tensor = torch.ops.autofunc.chunked_entropy(hidden, weight, bias, labels, ignored, num_chunks)
    return made


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype


def _chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, num_chunks: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Yield rows, their logits and their labels."""
    for rows, theirs in zip(hidden.chunk(num_chunks), labels.chunk(num_chunks), strict=True):
        logits = functional.linear(rows, weight, bias)
        yield rows, logits.to(_exact(logits.dtype)), theirs


@torch.library.impl("autofunc::chunked_entropy", "CompositeExplicitAutograd")
def _sum(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignored: int, num_chunks: int
) -> Tensor:  # fmt: skip
    total = torch.zeros((), dtype=_exact(hidden.dtype), device=hidden.device)
    for _, logits, theirs in _chunks(hidden, weight, bias, labels, num_chunks):
        total += functional.cross_entropy(logits, theirs, ignore_index=ignored, reduction="sum")
    return total


@torch.library.impl("autofunc::chunked_entropy_backward", "CompositeExplicitAutograd")
def _gradients(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignored: int, num_chunks: int,
    wanted: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Return gradients of hidden states, weight and bias, as far as wanted, summed over chunks in fp32 or wider."""
    of_hidden, of_weight, of_bias = wanted
    parts: list[Tensor] = []
    dtype = _exact(weight.dtype)
    weight_sum = torch.zeros_like(weight, dtype=dtype) if of_weight else None
    bias_sum = torch.zeros_like(bias, dtype=dtype) if of_bias and bias is not None else None
    for rows, logits, theirs in _chunks(hidden, weight, bias, labels, num_chunks):
        counts = theirs != ignored
        slope = logits.sub_(logits.logsumexp(-1, keepdim=True)).exp_()
        slope.scatter_add_(1, theirs.where(counts, 0)[:, None], slope.new_full((1, 1), -1.0).expand(len(theirs), 1))
        slope.mul_((counts * grad)[:, None])
        if bias_sum is not None:
            bias_sum += slope.sum(0)
        slope = slope.to(hidden.dtype)
        if of_hidden:
            parts.append(slope @ weight)
        if weight_sum is not None:
            weight_sum += slope.t() @ rows
    found = [torch.cat(parts)] if of_hidden else []
    found += [] if weight_sum is None else [weight_sum.to(weight.dtype)]
    return found + ([] if bias_sum is None or bias is None else [bias_sum.to(bias.dtype)])


def _fake_gradients(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignored: int, num_chunks: int,
    wanted: list[bool],
) -> list[Tensor]:  # fmt: skip
    return [
        torch.empty_like(each, memory_format=torch.contiguous_format)
        for each, is_wanted in zip((hidden, weight, bias), wanted, strict=True)
        if is_wanted and each is not None
    ]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.ignored, ctx.num_chunks = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    made = iter(
        torch.ops.autofunc.chunked_entropy_backward(grad, *ctx.saved_tensors, ctx.ignored, ctx.num_chunks, wanted)
    )  # fmt: skip
    return (*(next(made) if is_wanted else None for is_wanted in wanted), None, None, None)


torch.library.register_fake(
    "autofunc::chunked_entropy", lambda hidden, *_: hidden.new_empty((), dtype=_exact(hidden.dtype))
)  # fmt: skip
torch.library.register_fake("autofunc::chunked_entropy_backward", _fake_gradients)
torch.library.register_autograd("autofunc::chunked_entropy", _backward, setup_context=_keep)

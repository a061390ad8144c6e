"""Products of rows in groups: each expert's rows with that expert's matrix.

Rows are sorted by expert, and `ends` holds the end of each group, so no shape depends on the number of rows an expert gets.
Rows past the last end belong to no expert: they count nowhere and come out as zeros. Each gradient is one operator, so that
a weight's gradient can wait for `W`.

Shapes: R rows, E experts, `ends` int32 (E,).

On the CPU the host reads `ends` and multiplies group by group. On a GPU, bf16 matrices whose sizes are multiples of 8 go
to `torch.nn.functional.grouped_mm`, which never makes the host wait; others are multiplied as on the CPU, and it waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_ALIGNED = 8  # bf16 numbers in the 16 bytes that rows must be multiples of

torch.library.define("autofunc::grouped_linear", "(Tensor x, Tensor weight, Tensor ends) -> Tensor")
torch.library.define("autofunc::grouped_matmul", "(Tensor x, Tensor weight, Tensor ends) -> Tensor")
torch.library.define("autofunc::grouped_outer", "(Tensor a, Tensor b, Tensor ends) -> Tensor")
torch.library.define("autofunc::grouped_rows", "(Tensor table, Tensor ends, Tensor like) -> Tensor")
torch.library.define("autofunc::grouped_sum", "(Tensor x, Tensor ends) -> Tensor")


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply `functional.linear` to each group, with its expert's weight and bias: (R, out).

    Args:
        x: (R, in), sorted by expert.
        weight: (E, out, in).
        ends: int32 (E,), the end of each expert's rows.
        bias: (E, out).
    """
    made: Tensor = torch.ops.autofunc.grouped_linear(x, weight, ends)
    return made if bias is None else made + grouped_rows(bias, ends, x)


def grouped_matmul(x: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None = None) -> Tensor:
    """Like `grouped_linear`, for transposed weights: (E, in, out)."""
    made: Tensor = torch.ops.autofunc.grouped_matmul(x, weight, ends)
    return made if bias is None else made + grouped_rows(bias, ends, x)


def grouped_rows(table: Tensor, ends: Tensor, like: Tensor) -> Tensor:
    """Look up each row's expert in a table, (E, width) -> (R, width), for as many rows as `like` has.

    R is read from `like`, so that a graph captured with one process's rows can run with the rows of several.
    """
    made: Tensor = torch.ops.autofunc.grouped_rows(table, ends, like.detach())
    return made


def _groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield each expert that has rows, and its rows."""
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end


def _has_kernel(*operands: Tensor) -> bool:
    return all(
        each.is_cuda and each.dtype == torch.bfloat16 and each.shape[-1] % _ALIGNED == 0 and each.is_contiguous()
        for each in operands
    )  # fmt: skip


def _inside(made: Tensor, ends: Tensor) -> Tensor:
    """Zero the rows that belong to no expert, which the kernel leaves untouched."""
    place = torch.arange(made.shape[0], device=made.device)
    return made.masked_fill_((place >= ends[-1])[:, None], 0)


@torch.library.impl("autofunc::grouped_linear", "CompositeExplicitAutograd")
def _linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if _has_kernel(x, weight) and weight.shape[1] % _ALIGNED == 0:
        return _inside(functional.grouped_mm(x, weight.transpose(-2, -1), offs=ends), ends)
    made = x.new_zeros(x.shape[0], weight.shape[1])
    for expert, rows in _groups(ends):
        torch.mm(x[rows], weight[expert].t(), out=made[rows])
    return made


@torch.library.impl("autofunc::grouped_matmul", "CompositeExplicitAutograd")
def _matmul(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if _has_kernel(x, weight):
        return _inside(functional.grouped_mm(x, weight, offs=ends), ends)
    made = x.new_zeros(x.shape[0], weight.shape[2])
    for expert, rows in _groups(ends):
        torch.mm(x[rows], weight[expert], out=made[rows])
    return made


@torch.library.impl("autofunc::grouped_outer", "CompositeExplicitAutograd")
def _outer(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    if _has_kernel(a, b):
        return functional.grouped_mm(a.t(), b, offs=ends)
    made = a.new_zeros(ends.shape[0], a.shape[1], b.shape[1])
    for expert, rows in _groups(ends):
        torch.mm(a[rows].t(), b[rows], out=made[expert])
    return made


@torch.library.impl("autofunc::grouped_rows", "CompositeExplicitAutograd")
def _rows(table: Tensor, ends: Tensor, like: Tensor) -> Tensor:
    place = torch.arange(like.shape[0], device=table.device, dtype=ends.dtype)
    owner = torch.searchsorted(ends, place, right=True)
    return table.new_zeros(1).where((owner == len(ends))[:, None], table[owner.clamp_(max=len(ends) - 1)])


@torch.library.impl("autofunc::grouped_sum", "CompositeExplicitAutograd")
def _sum(x: Tensor, ends: Tensor) -> Tensor:
    place = torch.arange(x.shape[0], device=x.device, dtype=ends.dtype)
    owner = torch.searchsorted(ends, place, right=True)  # one past the last expert for rows that have none
    return x.new_zeros(len(ends) + 1, x.shape[1]).index_add_(0, owner, x)[:-1].clone()


torch.library.register_fake(
    "autofunc::grouped_linear", lambda x, weight, ends: x.new_empty(x.shape[0], weight.shape[1])
)  # fmt: skip
torch.library.register_fake(
    "autofunc::grouped_matmul", lambda x, weight, ends: x.new_empty(x.shape[0], weight.shape[2])
)  # fmt: skip
torch.library.register_fake(
    "autofunc::grouped_outer", lambda a, b, ends: a.new_empty(ends.shape[0], a.shape[1], b.shape[1])
)
torch.library.register_fake(
    "autofunc::grouped_rows", lambda table, ends, like: table.new_empty(like.shape[0], table.shape[1])
)
torch.library.register_fake("autofunc::grouped_sum", lambda x, ends: x.new_empty(ends.shape[0], x.shape[1]))

_ops = torch.ops.autofunc

PRODUCTS = (_ops.grouped_linear.default, _ops.grouped_matmul.default, _ops.grouped_outer.default)
"""Operators that multiply each row by one matrix, or add its product to one."""


def product_work(rows: torch.Size, other: torch.Size) -> int:
    """Count the multiplications of one of `PRODUCTS`, given the shapes of its first two arguments."""
    width = other[1] if len(other) == 2 else other[1] * other[2] // rows[1]
    return rows[0] * rows[1] * width


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*(each for each in inputs if isinstance(each, Tensor)))


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x, weight, ends), (of_x, of_weight, _), grad = ctx.saved_tensors, ctx.needs_input_grad, grad.contiguous()
    return (
        _ops.grouped_matmul(grad, weight, ends) if of_x else None,
        _ops.grouped_outer(grad, x, ends) if of_weight else None,
        None,
    )


def _matmul_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x, weight, ends), (of_x, of_weight, _), grad = ctx.saved_tensors, ctx.needs_input_grad, grad.contiguous()
    return (
        _ops.grouped_linear(grad, weight, ends) if of_x else None,
        _ops.grouped_outer(x, grad, ends) if of_weight else None,
        None,
    )


def _rows_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _ops.grouped_sum(grad, ctx.saved_tensors[1]), None, None


torch.library.register_autograd("autofunc::grouped_linear", _linear_backward, setup_context=_keep)
torch.library.register_autograd("autofunc::grouped_matmul", _matmul_backward, setup_context=_keep)
torch.library.register_autograd("autofunc::grouped_rows", _rows_backward, setup_context=_keep)

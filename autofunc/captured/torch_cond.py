"""`torch.cond` and `torch.while_loop` become Python's `if` and `while`: decisions by data, see `branches.py`.

torch hands both to its compiler first, so that is set to run everything eagerly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from autofunc.captured.replacing import Replacing


def _cond(pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Sequence[Any] = ()) -> Any:
    return (true_fn if pred else false_fn)(*operands)


def _while_loop(
    cond_fn: Callable[..., Any], body_fn: Callable[..., Any], carried: Sequence[Any], additional: Sequence[Any] = ()
) -> tuple[Any, ...]:
    values = tuple(carried)
    while cond_fn(*values, *additional):
        values = tuple(body_fn(*values, *additional))
    return values


PYTHON_CONTROL_FLOW: dict[Any, Callable[..., Any]] = {
    torch.ops.higher_order.cond: _cond,
    torch.ops.higher_order.while_loop: _while_loop,
}
"""By torch operator: the function called instead."""


@contextmanager
def python_control_flow() -> Iterator[None]:
    """Inside, both run as Python control flow, and nothing is compiled."""
    with torch.compiler.set_stance("force_eager"), Replacing(PYTHON_CONTROL_FLOW):
        yield

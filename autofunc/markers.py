"""Named places to cut a captured function or module: `af.split_point` leaves a marker in the graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from autofunc import tree
from autofunc.errors import ModelError

torch.library.define("autofunc::split_point", "(Tensor(a) x, str name) -> Tensor(a)")


@torch.library.impl("autofunc::split_point", "CompositeExplicitAutograd")
def _marked(x: Tensor, name: str) -> Tensor:
    return x.view_as(x)


_marking: ContextVar[bool] = ContextVar("marking", default=False)


@contextmanager
def marking() -> Iterator[None]:
    """Make markers leave a trace while a forward is captured."""
    token = _marking.set(True)
    try:
        yield
    finally:
        _marking.reset(token)


def split_point(x: Any, name: str) -> Any:
    """Name a place to cut a captured function or module: a stage may begin after it.

    Args:
        x: a value used afterwards: a tensor, or a pytree with one.
        name: for `split_points`; unique in the model.

    Returns:
        `x` itself.

    Raises:
        ModelError: if `x` has no tensor, or the arguments are swapped.

    Example:
        def net(params, batch):
            x = torch.tanh(batch["x"] @ params["first"])
            x = af.split_point(x, "second")
            return x @ params["second"]
    """
    if isinstance(x, str):
        raise ModelError(
            f"af.split_point(x, name) takes the value first, but got {x!r} and {type(name).__name__}; write "
            f"af.split_point(x, {x!r})"
        )
    if not _marking.get():
        return x
    leaves, spec = tree.leaves_and_spec(x)
    position = next((index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)), None)
    if position is None:
        raise ModelError(f"af.split_point(x, {name!r}): x holds no tensor; it is {type(x).__name__}")
    leaves[position] = torch.ops.autofunc.split_point(leaves[position], name)
    return tree.from_leaves(leaves, spec)

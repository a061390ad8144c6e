"""Named places at which a captured function or module may be cut: `af.split_point` leaves a marker in the graph."""

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
    """While a forward is captured, its markers leave a trace."""
    token = _marking.set(True)
    try:
        yield
    finally:
        _marking.reset(token)


def split_point(x: Any, name: str) -> Any:
    """Name a place at which a captured function or module may be cut; a stage may begin after it.

    Args:
        x: a value that is needed afterwards: a tensor, or a pytree with one.
        name: what `split_points` call it; once in a model.

    Returns:
        `x` itself.

    Raises:
        ModelError: when there is no tensor in `x`, or the arguments are the wrong way round.

    Example:
        def net(params, batch):
            x = torch.tanh(batch["x"] @ params["first"])
            x = af.split_point(x, "second")
            return x @ params["second"]
    """
    if isinstance(x, str):
        raise ModelError(
            f"af.split_point(x, name) takes the value first, and got {x!r} and {type(name).__name__}; write "
            f"af.split_point(x, {x!r})"
        )
    if not _marking.get():
        return x
    leaves, spec = tree.leaves_and_spec(x)
    position = next((index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)), None)
    if position is None:
        raise ModelError(f"af.split_point(x, {name!r}): there is no tensor in x, which is {type(x).__name__}")
    leaves[position] = torch.ops.autofunc.split_point(leaves[position], name)
    return tree.from_leaves(leaves, spec)

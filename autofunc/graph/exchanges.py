"""Operators in which ranks exchange values, and how each is begun by itself: what comes after it need not wait for it.

An operator that is one node of a graph is one call to most who run it. Who runs two graphs side by side begins an exchange
of one, and computes nodes of the other until it waits for what was exchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

Node = fx.Node

Wait = Callable[[], Any]
"""Waits for what was begun, and gives what the operator gives."""

_begun_by: dict[Any, Callable[..., Wait] | None] = {}


def exchanges(operator: Any, begin: Callable[..., Wait] | None = None) -> None:
    """Say of an operator that all ranks of a group have to call it, and in the same order as their other exchanges.

    Args:
        operator: an overload, such as `torch.ops.autofunc.dispatch.default`.
        begin: takes its arguments, and begins it; None where it cannot be begun without being waited for.
    """
    _begun_by[operator] = begin


def at_once(begin: Callable[..., Wait]) -> Callable[..., Any]:
    """An operator by what begins it: it waits right away."""
    return lambda *given: begin(*given)()


def is_exchange(node: Node) -> bool:
    """Whether ranks exchange values in a node. torch's functional collectives are known; waiting for one is no exchange."""
    return node.target in _begun_by or (str(node.target).startswith("_c10d_functional.") and not is_wait(node))


def is_wait(node: Node) -> bool:
    """Whether a node waits for one of torch's functional collectives."""
    return node.target is torch.ops._c10d_functional.wait_tensor.default


def beginning_of(node: Node) -> Callable[..., Wait] | None:
    """What begins a node's exchange; None where calling it is all there is: a functional collective has its own wait."""
    return _begun_by.get(node.target)

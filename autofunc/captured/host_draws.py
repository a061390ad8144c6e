"""Draws from Python's and numpy's generators. A capture would fix them once and for all, so they may not affect the graph.

They may be made without an effect, as for layers that are dropped with probability 0.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autofunc.errors import ModelError


class HostDraws:
    """The generators that a forward draws from."""

    def __init__(self) -> None:
        self.names: list[str] = []

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Wrap a forward: record which generators it draws from, and restore their states."""
        before = _states()
        with restored_host_generators():
            try:
                yield
            finally:
                self.names = [name for name, state in _states().items() if state != before[name]]


def refuse_host_draws(draws: HostDraws, first: Any, again: Callable[[], Any], what: str) -> None:
    """Refuse a forward that changes when its generators give other numbers.

    Args:
        draws: the draws made while it was exported.
        first: the exported program.
        again: exports it again.
        what: the module, for messages.

    Raises:
        ModelError: naming the generators.
    """
    names = " and ".join(draws.names)
    if not names:
        return
    try:
        with _others():
            second = again()
        same = str(first.graph) == str(second.graph) and _equal(first.constants, second.constants)
    except Exception:  # raised by user code that meets other numbers
        same = False
    if not same:
        raise ModelError(
            f"{what} draws from {names}, and a capture would fix those draws for good; draw with torch.rand, which becomes "
            "a function of the key, pass the draws in the batch, or turn them off: layerdrop=0, mask_time_prob=0, eval mode"
        )


@contextmanager
def restored_host_generators() -> Iterator[None]:
    """Restore Python's and numpy's global generators afterwards."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


def _states() -> dict[str, Any]:
    return {"Python's random": random.getstate(), "numpy.random": pickle.dumps(np.random.get_state())}


@contextmanager
def _others() -> Iterator[None]:
    """Inside, the generators first give zeros, which are below every probability except 0, then other numbers."""
    words = np.concatenate([np.zeros(400), np.random.default_rng(1).integers(1, 2**32, 224)]).astype(np.uint32)
    with restored_host_generators():
        random.setstate((3, (*map(int, words), 0), None))  # a Mersenne twister's state is its next outputs
        np.random.set_state(("MT19937", words, 0, 0, 0.0))
        yield


def _equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    pairs = [(one[name], other.get(name)) for name in one]
    tensors = [(each, also) for each, also in pairs if isinstance(each, Tensor) and isinstance(also, Tensor)]
    return one.keys() == other.keys() and all(torch.equal(each, also) for each, also in tensors)

"""Draws from Python's and numpy's generators: a capture would make them once and for all, so they may not matter.

They may be made and not matter: layers that are dropped with probability 0.
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
    """Which generators a forward draws from."""

    def __init__(self) -> None:
        self.names: list[str] = []

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Around a forward: sees what it draws, and puts the generators back."""
        before = _states()
        python, numbers = random.getstate(), np.random.get_state()
        try:
            yield
        finally:
            self.names = [name for name, state in _states().items() if state != before[name]]
            random.setstate(python)
            np.random.set_state(numbers)


def refuse_host_draws(draws: HostDraws, first: Any, again: Callable[[], Any], what: str) -> None:
    """Refuse a forward that is another one where its generators give other numbers.

    Args:
        draws: what it drew from when it was exported.
        first: the exported program.
        again: exports it once more.
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
    except Exception:  # whatever the user's code makes of other numbers
        same = False
    if not same:
        raise ModelError(
            f"{what} draws from {names}, which a capture would do once and for all; draw by torch.rand, which becomes a "
            "function of the key, pass what is drawn in the batch, or turn it off: layerdrop=0, mask_time_prob=0, eval mode"
        )


def _states() -> dict[str, Any]:
    return {"Python's random": random.getstate(), "numpy.random": pickle.dumps(np.random.get_state())}


@contextmanager
def _others() -> Iterator[None]:
    """Inside, generators give zeros first, which are below every probability but 0, and then other numbers."""
    python, numbers = random.getstate(), np.random.get_state()
    words = np.concatenate([np.zeros(400), np.random.default_rng(1).integers(1, 2**32, 224)]).astype(np.uint32)
    random.setstate((3, (*map(int, words), 0), None))  # the state of a Mersenne twister is what it gives next
    np.random.set_state(("MT19937", words, 0, 0, 0.0))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


def _equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    pairs = [(one[name], other.get(name)) for name in one]
    tensors = [(each, also) for each, also in pairs if isinstance(each, Tensor) and isinstance(also, Tensor)]
    return one.keys() == other.keys() and all(torch.equal(each, also) for each, also in tensors)

"""CUDA graphs on the CPU: operators are noted in a run, and run again on the same memory.

As in a capture, what is made while they are noted is not there afterwards: it is filled with NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from autofunc.tree import leaves_and_spec


class ReplayedGraphs:
    """See `cuda_graphs.Graphs`."""

    def __init__(self, device: torch.device) -> None:
        self.made: list[ReplayedGraph] = []

    @staticmethod
    def is_available() -> bool:
        return True

    def make_room(self) -> None:
        pass

    @contextmanager
    def capturing(self) -> Iterator[None]:
        yield

    def new(self) -> ReplayedGraph:
        self.made.append(ReplayedGraph())
        return self.made[-1]


class ReplayedGraph(TorchDispatchMode):
    """See `tape.Graph`."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[Any, Any, Any, list[tuple[int, Tensor]]]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {leaf.untyped_storage().data_ptr() for leaf in _tensors((args, kwargs))}
        made = func(*args, **kwargs)
        fresh = [
            (number, leaf)
            for number, leaf in enumerate(_tensors(made))
            if leaf.untyped_storage().data_ptr() not in given and leaf.numel()
        ]
        self.noted.append((func, args if isinstance(args, tuple) else tuple(args), kwargs, fresh))
        return made

    def begin(self) -> None:
        self.__enter__()

    def end(self) -> None:
        self.__exit__(None, None, None)
        for *_, fresh in self.noted:
            for _, leaf in fresh:
                if leaf.is_floating_point():
                    leaf.fill_(float("nan"))

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, fresh in self.noted:
            made = _tensors(func(*args, **kwargs))
            for number, leaf in fresh:
                leaf.copy_(made[number])


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in leaves_and_spec(tree)[0] if isinstance(leaf, Tensor)]

"""Graph modules whose Python code is written when they are called for the first time, not whenever their graph changes.

`torch.export` changes the graph of a model some twenty times and calls it never. To write and compile its code each time
took a quarter of a capture. Torch has a class that does the same, `torch.fx._lazy_graph_module`; export does not use it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx

_recompile = fx.GraphModule.recompile
_guard = threading.Lock()
_inside = 0


@contextmanager
def lazy_code() -> Iterator[None]:
    """Graphs that change in here, in any thread, are written as code when their module is called."""
    global _inside
    with _guard:
        _inside += 1
        fx.GraphModule.recompile = _later  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        with _guard:
            _inside -= 1
            if not _inside:
                fx.GraphModule.recompile = _recompile  # type: ignore[method-assign]


def _later(module: fx.GraphModule) -> None:
    made: Any = type(module)  # every graph module has a class of its own
    made.forward = _forward


def _forward(module: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
    _recompile(module)
    return module.forward(*args, **kwargs)

"""Graph modules that generate their Python code on the first call, not whenever their graph changes.

`torch.export` changes a model's graph about twenty times and never calls it. Generating and compiling the code each time
took a quarter of a capture. Torch's own class for this, `torch.fx._lazy_graph_module`, is not used by export.
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
    """Defer code generation, in all threads: graphs that change inside generate code when their module is called."""
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
    made: Any = type(module)  # every graph module has its own class
    made.forward = _forward


def _forward(module: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
    _recompile(module)
    return module.forward(*args, **kwargs)

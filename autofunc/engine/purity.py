"""Stages are pure functions: in-place writes to arguments, global random draws and changed globals are refused."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode  # has no public name; tried with torch 2.13.0

from autofunc.errors import ModelError
from autofunc.fake import user_line
from autofunc.graph.memory import base_of, is_copied_first, written
from autofunc.graph.schema import is_mutable, is_random
from autofunc.installed import is_installed


def refuse_effects(graph: fx.Graph, what: str, run: Callable[[], Any]) -> bool:
    """Refuse side effects; return whether the graph writes to its own temporaries in place.

    Args:
        graph: the traced graph.
        what: the stage, for messages.
        run: traces again, to find the user's line.

    Raises:
        ModelError: if it writes to a parameter, an input or a tensor from outside, or uses the global random generator,
            naming the user's line.
    """
    for node in graph.nodes:
        if is_random(node):
            raise ModelError(
                f"{what} draws from the global random generator ({node.target}; {_line_of(node.target, run)}), so it is "
                'not a pure function; use af.random.dropout(x, p), another function of batch["key"] such as '
                'af.random.normal(af.random.fold_in(batch["key"], name), shape), or engine="eager"'
            )
        for base in map(base_of, written(node)):
            if base.op == "placeholder" or (base.op == "get_attr" and not is_copied_first(base)):
                owner = "one of its inputs or parameters" if base.op == "placeholder" else "a tensor from outside"
                raise ModelError(
                    f"{what} writes to {owner} ({node.target}; {_line_of(node.target, run)}); a stage is a pure "
                    "function: compute a new tensor instead"
                )
    return any(is_mutable(node) for node in graph.nodes)


class _Found(Exception):
    """Ends a run at the operator sought."""


class _Finder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stops at the first call of an operator, and keeps the user's line."""

    def __init__(self, target: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.target, self.line = target, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self.target:
            self.line = user_line(traceback.extract_stack())
            raise _Found
        return func(*args, **(kwargs or {}))


def _line_of(target: Any, run: Callable[[], Any]) -> str:
    """Find the line of the user's code that first calls an operator."""
    finder = _Finder(target)
    try:
        with finder:
            run()
    except _Found:
        return finder.line
    return "its line was not found"


@contextmanager
def globals_unchanged(functions: Iterable[Callable[..., Any]], what: str) -> Iterator[None]:
    """Refuse functions that change a global variable, or the length of a global container, while they are traced.

    Raises:
        ModelError: naming the variable: a captured stage runs without the function, so it would change only once.
    """
    known = {(id(space), name): (space, _state(space[name])) for space, name in _globals_of(functions)}
    yield
    for (_, name), (space, before) in known.items():
        if _state(space.get(name)) != before:
            raise ModelError(
                f"{what} changes the global {name!r} of {space.get('__name__')} while it runs, which a captured stage "
                'would do only once; return what it needs to keep, for example as aux of the loss, or use engine="eager"'
            )


def _state(value: Any) -> tuple[int, int]:
    plain = isinstance(value, (list, dict, set)) and isinstance(value, Sized)
    return id(value), len(value) if plain else 0


def _globals_of(functions: Iterable[Callable[..., Any]]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (module's globals, name) of every global that the user's functions, or those they call or close over, name.

    Installed libraries are skipped: their caches grow.
    """
    seen: set[int] = set()
    left: list[Any] = list(functions)
    while left:
        function = left.pop()
        function = getattr(function, "func", function)  # of a partial
        code = getattr(function, "__code__", None)
        if code is None or id(function) in seen or is_installed(code.co_filename):
            continue
        seen.add(id(function))
        codes = [code]
        while codes:
            inner = codes.pop()
            codes += [constant for constant in inner.co_consts if hasattr(constant, "co_names")]
            for name in inner.co_names:
                if name in function.__globals__:
                    yield function.__globals__, name
                    left.append(function.__globals__[name])
        for cell in function.__closure__ or ():
            left.append(cell.cell_contents)

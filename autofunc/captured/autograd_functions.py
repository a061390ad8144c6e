"""A `torch.autograd.Function` is captured whole and applied when its layer runs, so that it keeps the user's gradient.

While a forward is exported, `apply` records its arguments and becomes one opaque operator. In the layers, that operator is
the function again, really applied, so that a stage's capture sees the backward that the user wrote.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.distributions import dirichlet
from torch.utils.checkpoint import CheckpointFunction

from autofunc import tree
from autofunc.cache import Identity
from autofunc.errors import ModelError
from autofunc.fingerprint import Fingerprint, Fingerprinted
from autofunc.graph.trace import trace


@dataclass(frozen=True)
class Hole:
    """Stands for a tensor among arguments or results."""

    number: int


@dataclass(frozen=True, eq=False)
class Applied(Fingerprinted):
    """One call of a function: `applied(tensors)` returns the tensors among its results."""

    function: type[torch.autograd.Function]
    args: tuple[Any, ...]  # with a `Hole` for each tensor

    def fingerprint(self, keys: Fingerprint) -> Hashable:
        """Of the function's class and its plain arguments."""
        return Identity(self.function), keys.of(self.args)

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Apply the function; return the tensors among its results."""
        return _tensors(self.results(tensors))

    def results(self, tensors: Sequence[Tensor]) -> Any:
        """Apply the function; return all its results."""
        args = (tensors[arg.number] if isinstance(arg, Hole) else arg for arg in self.args)
        applying: Any = super(torch.autograd.Function, self.function)  # as `Function.apply` does
        return applying.apply(*args)


_INDEXING = ("torch._dynamo._trace_wrapped_higher_order_op", "ModIndex")
"""The indexing that `vmap` maps; its gradient is the operator's own."""

# The calls of the forward being exported, and their results apart from tensors. Only one forward is exported at a time.
_calls: list[Applied] = []
_results: list[Any] = []

_DIRICHLET = dirichlet._Dirichlet  # it has no public name; tried with torch 2.13.0

# Its code is replaced, not the method: models bind the method when they are imported (`gelu = GELU.apply`).
_FUNCTION: Any = torch.autograd.Function.__dict__["apply"].__func__


class _Recording(torch.autograd.Function):
    """Its `apply` runs in place of every function's: it has the same signature, and a cell for its class too."""

    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        __class__  # type: ignore[name-defined]  # noqa: B018
        from autofunc.captured.autograd_functions import record

        return record(cls, args, kwargs)


def record(function: type[torch.autograd.Function], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Note a call of a function; return its results, made by the operator that stands for it."""
    if function is _DIRICHLET:  # its draws must be visible, see `draws.py`
        return torch.ops.aten._sample_dirichlet(*args)
    if (function.__module__, function.__name__) == _INDEXING:
        return torch.ops.aten.index(*args)
    if function is CheckpointFunction:  # the pipeline decides what to keep and what to recompute
        run, _, *given = args
        return run(*given)
    if function.setup_context is not torch.autograd.Function.setup_context:  # then `apply` has the signature of `forward`
        bound = inspect.signature(function.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        args, kwargs = bound.args, {}
    if kwargs:
        raise ModelError(f"{function.__name__}.apply takes no keywords without setup_context; got {', '.join(kwargs)}")
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    number, places = len(_calls), iter(range(len(tensors)))
    _calls.append(Applied(function, tuple(Hole(next(places)) if isinstance(arg, Tensor) else arg for arg in args)))
    _results.append(None)
    made = iter(torch.ops.autofunc.applied(number, tensors))
    return tree.map_leaves(lambda leaf: next(made) if isinstance(leaf, Tensor) else leaf, _results[number])


_library = torch.library.Library("autofunc", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("applied(int number, Tensor[] tensors) -> Tensor[]")  # type: ignore[no-untyped-call]


def _run(number: int, tensors: list[Tensor]) -> list[Tensor]:
    call = _calls[number]
    versions = [tensor._version for tensor in tensors]
    with torch.no_grad():
        results = call.results(tensors)
    if versions != [tensor._version for tensor in tensors]:
        raise ModelError(f"{call.function.__name__} writes to its inputs, so it cannot be captured; return a new tensor")
    _results[number] = results
    given = {tensor.untyped_storage()._cdata for tensor in tensors}
    # an operator may not return memory it was given
    return [each.clone() if each.untyped_storage()._cdata in given else each for each in _tensors(results)]


_library.impl("applied", _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("autofunc::applied", _run)


@contextmanager
def recorded() -> Iterator[None]:
    """Inside, calls of functions become operators, see `apply_for_real`."""
    _calls.clear()
    _results.clear()
    original = _FUNCTION.__code__
    _FUNCTION.__code__ = _Recording.__dict__["apply"].__func__.__code__
    try:
        yield
    finally:
        _FUNCTION.__code__ = original


def apply_for_real(graph: fx.Graph) -> None:
    """Replace the operators by the functions they stand for; right after the export that recorded them."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target is torch.ops.autofunc.applied.default:
            number, tensors = node.args
            node.target, node.args = _calls[number], (tensors,)
    _calls.clear()
    _results.clear()


def operators_of(node: fx.Node) -> list[fx.Node]:
    """Return the operators in the forward of a node's function; none for other nodes."""
    if not isinstance(node.target, Applied):
        return []
    fakes = [each.meta["val"] for each in node.args[0]]  # type: ignore[union-attr]
    with torch.no_grad():
        return list(trace(lambda *tensors: node.target(tensors), *fakes).graph.nodes)  # type: ignore[operator]


def _tensors(results: Any) -> list[Tensor]:
    return [leaf for leaf in tree.leaves_and_spec(results)[0] if isinstance(leaf, Tensor)]

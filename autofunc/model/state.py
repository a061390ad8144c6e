"""The state a layer carries from one microbatch to the next: it goes in, and new state comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from autofunc import tree
from autofunc.errors import ModelError, one_of, some_of
from autofunc.model.layer import Layer, drawing_as

State = Mapping[str, Tensor]
"""A layer's state, by path inside the layer."""

StatefulFunction = Callable[[Mapping[str, Any], Any, Any, State], tuple[Any, State]]
"""`function(params, x, entries, state) -> (x, state)`: a `LayerFunction` of a layer with state."""


def stateful(name: str, layer: Layer, *, training: bool) -> StatefulFunction:
    """Return a hand-written layer's function for training or evaluation; it checks the state that the layer returns.

    Raises:
        ModelError: from the function, if the layer does not return a pair, or changes the form of its state.
    """

    apply = drawing_as(name, layer.apply)

    def function(params: Mapping[str, Any], x: Any, entries: Any, state: State) -> tuple[Any, State]:
        made = apply(params, x, entries, tree.nest(state), training)
        if not (isinstance(made, tuple) and len(made) == 2):
            raise ModelError(
                f"layer {name!r} has an init_state, so its apply(params, x, batch, state, training) returns (x, state); it "
                f"returned {type(made).__name__}"
            )
        given, returned = made
        return given, alike(name, state, tree.flatten(returned))

    return function


def alike(name: str, before: State, after: Mapping[str, Any]) -> State:
    """Check that a layer's new state has the form of the old one, and return it detached.

    Raises:
        ModelError: naming state that is missing, unknown, or of a different shape or dtype.
    """
    for path in (*before, *after):
        if path not in after or path not in before:
            what = "does not return" if path not in after else "returns an unknown"
            raise ModelError(f"layer {name!r} {what} state {path!r}; {one_of(path, before)}")
        old, new = before[path], after[path]
        if not isinstance(new, Tensor) or (new.shape, new.dtype) != (old.shape, old.dtype):
            found = f"{tuple(new.shape)} {new.dtype}" if isinstance(new, Tensor) else type(new).__name__
            raise ModelError(
                f"layer {name!r} returns state {path!r} as {found}, and received {tuple(old.shape)} {old.dtype}; state "
                "keeps its shapes and dtypes"
            )
    return {path: after[path].detach() for path in before}


def given_state(spec: Mapping[str, Tensor], state: tree.Nested | None, title: str, initial: str) -> dict[str, Tensor]:
    """Return a tree of state that a caller passed, flat, after checking it.

    Args:
        spec: path -> a tensor of the expected shape and dtype.
        state: a tree that holds at least these paths; None is refused if there are any.
        title: of the model, for messages.
        initial: the call that returns the first state, for messages.

    Raises:
        ModelError: if the tree is missing, or any of its state is missing or has the wrong shape or dtype.
    """
    if state is None and spec:
        raise ModelError(
            f"{title} keeps state ({some_of(spec)}): pass state={initial}, or the state that the last step returned"
        )
    flat = {} if state is None else tree.flatten(state)
    check_state(spec, flat)
    return flat


def check_state(spec: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Refuse a flat tree that does not hold all of this state.

    Args:
        spec: path -> a tensor of the expected shape and dtype.
        state: path -> tensor; it may hold more.

    Raises:
        ModelError: naming state that is missing, or has the wrong shape or dtype.
    """
    for path, like in spec.items():
        leaf = state.get(path)
        if not isinstance(leaf, torch.Tensor):
            raise ModelError(f"state has no {path!r}; {one_of(path, state)}; init_state() returns all of it")
        if (leaf.shape, leaf.dtype) != (like.shape, like.dtype):
            raise ModelError(
                f"state {path!r} is {tuple(leaf.shape)} {leaf.dtype}; expected {tuple(like.shape)} {like.dtype}"
            )

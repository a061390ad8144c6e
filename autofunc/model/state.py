"""What a layer hands from one microbatch to the next: state goes in, and comes out anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from autofunc import tree
from autofunc.errors import ModelError, one_of
from autofunc.model.layer import Layer, drawing_as

State = Mapping[str, Tensor]
"""A layer's state by the paths that it has in the layer."""

StatefulFunction = Callable[[Mapping[str, Any], Any, Any, State], tuple[Any, State]]
"""`function(params, x, entries, state) -> (x, state)`: a `LayerFunction` of a layer with state."""


def stateful(name: str, layer: Layer, *, training: bool) -> StatefulFunction:
    """A hand-written layer's function for training or evaluation; what it returns as its state is checked.

    Raises:
        ModelError: from the function, when it returns no pair, or a state of another form.
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
    """A layer's new state, without gradients, once it has the form of the old one.

    Raises:
        ModelError: naming what is missing, or not as it was.
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


def check_state(spec: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Refuse a flat tree that is not a state of this form.

    Args:
        spec: path -> a tensor of the wanted shape and dtype.
        state: path -> tensor; it may have more.

    Raises:
        ModelError: naming what is missing, or not as it should be.
    """
    for path, like in spec.items():
        leaf = state.get(path)
        if not isinstance(leaf, torch.Tensor):
            raise ModelError(f"state has no {path!r}; {one_of(path, state)}; init_state() makes all of it")
        if (leaf.shape, leaf.dtype) != (like.shape, like.dtype):
            raise ModelError(
                f"state {path!r} is {tuple(leaf.shape)} {leaf.dtype}; expected {tuple(like.shape)} {like.dtype}"
            )

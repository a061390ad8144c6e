"""A model's layers and loss on one rank's tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from autofunc import tree
from autofunc.captured.segment import Segment
from autofunc.context_parallel import batch_statistics as batch_statistics  # enters its rules
from autofunc.context_parallel.axis import ContextAxis
from autofunc.context_parallel.entries import (
    TokenEntries,
    device_of,
    faked,
    named_tensors,
    refilled,
    tensors_in,
    with_tensors,
)
from autofunc.context_parallel.local_graph import LocalGraph
from autofunc.context_parallel.moves import added_up, all_tokens, own_tokens
from autofunc.context_parallel.program import segment_of
from autofunc.context_parallel.recorded import recorded
from autofunc.context_parallel.token_dims import of_entries, of_shared
from autofunc.context_parallel.traced import Traced, traced
from autofunc.context_parallel.with_tensor_parallel import handing_out_whole
from autofunc.errors import ModelError
from autofunc.experts import recorded_as_operators
from autofunc.fake import fake_mode, naming_errors
from autofunc.losses import Loss, LossTerms, evaluate
from autofunc.model import Model, Specialised, State, StatefulFunction
from autofunc.spreading import TERMS, Cut
from autofunc.spreading.layouts import Layout

Piece = tuple[str, int, tuple[int, ...]]
"""An entry of which this rank's tokens are wanted: its name, the tokens' dim, and the lengths of the sequences along it."""


@dataclass(frozen=True)
class LocalLayer:
    """A layer on one rank's tokens; plain data."""

    segment: Segment
    pieces: tuple[Piece, ...]
    layouts: tuple[Layout | None, ...]  # of the leaves it returns; None for leaves that are not tensors


@dataclass(frozen=True)
class OverTokens(Specialised):
    """A `Specialised` on each rank's own tokens.

    Args:
        axis: the ranks.
        layers: by name.
        output: the last layer's whole output, on fake tensors.
        loss_layer: the loss, set by `with_loss`.
    """

    axis: ContextAxis = field(kw_only=True)
    layers: Mapping[str, LocalLayer] = field(kw_only=True)
    output: Any = field(kw_only=True)
    loss_layer: LocalLayer | None = None

    def whole(self, x: Any) -> Any:
        """Gather the last layer's whole output; every rank calls it."""
        leaves, spec = tree.leaves_and_spec(x)
        layouts = list(self.layers.values())[-1].layouts
        return tree.from_leaves([self._full(*each) for each in zip(leaves, layouts, strict=True)], spec)

    def _full(self, leaf: Any, layout: Layout | None) -> Any:
        if isinstance(layout, Cut):
            return all_tokens(leaf, layout.dim, layout.parts, self.axis.ranks)
        return added_up(leaf, self.axis.ranks) if layout is TERMS else leaf

    def with_loss(self, loss: Loss | None, microbatch: Mapping[str, Any], output: Callable[[Any], Any]) -> OverTokens:
        """Add a loss of the last layer's output.

        Args:
            loss: see `losses.evaluate`.
            microbatch: an example.
            output: applied to the last layer's output before the loss.

        Raises:
            ModelError: for a loss that mixes tokens in a way no rule allows.
        """
        with fake_mode() as mode, naming_errors("the loss"):
            entries = faked(mode, microbatch)
            x = tree.map_leaves(lambda leaf: _fresh(leaf) if isinstance(leaf, Tensor) else leaf, output(self.output))
            layouts = list(self.layers.values())[-1].layouts

            def function(params: Any, received: Sequence[Tensor], given: Mapping[str, Tensor], states: Any) -> Any:
                terms = evaluate(loss, refilled(x, received), with_tensors(entries, given))
                return (terms.sum, terms.weight, terms.aux), {}

            whole = traced(function, {}, tensors_in(x), named_tensors(entries), {})
            natural = of_entries(named_tensors(entries))
            local = _local(whole, [each for each in layouts if each is not None], natural, self.axis, "the loss")
            returned = [
                each if number not in local.layouts else local.terms(number) if number < 2 else local.full(number)
                for number, each in enumerate(local.returned)
            ]
            made = _layer(whole, local, returned, "the loss", [None] * len(returned))
        return replace(self, loss_layer=made)

    def loss_terms(self, x: Any, microbatch: Mapping[str, Any]) -> LossTerms:
        """Return this rank's terms of the loss and its weight, and aux in full; every rank calls it."""
        assert self.loss_layer is not None
        received = tensors_in(x)
        given = _with_pieces(named_tensors(microbatch), self.loss_layer.pieces, self.axis)
        (total, weight, aux), _ = self.loss_layer.segment({}, received, given, received[0].device, None)
        return LossTerms(total, weight, aux)


def over_tokens(
    base: Specialised, model: Model, leaves: Mapping[str, Tensor], microbatch: Mapping[str, Any], axis: ContextAxis,
    other_axis: str | None = None,
) -> OverTokens:  # fmt: skip
    """Cut the tokens of a model over cp ranks.

    Args:
        base: the whole model, specialised to such microbatches.
        model: the model that `base` specialises.
        leaves: parameters of every holder, with the shapes and dtypes that ranks compute with; values are not read.
        microbatch: an example, as layers see it.
        axis: the ranks.
        other_axis: the name of an axis over which the model is already cut, and whose partitioning is active.

    Raises:
        ModelError: for layers that mix tokens outside attention, and when no tokens are found.
        BatchError: for a sequence that does not divide into equal chunks.
    """
    layers: dict[str, LocalLayer] = {}
    with fake_mode() as mode, handing_out_whole(other_axis), recorded_as_operators():
        batch = faked(mode, microbatch)
        with naming_errors(model.title):
            entries = base.share(list(model.layers), batch)
        tensors = named_tensors(entries)
        natural = _natural(base, model, batch, list(tensors), axis)
        device = device_of(batch)
        x, layouts = None, list[Layout | None]([None])
        for name in model.layers:
            own = {path: leaf for path, leaf in leaves.items() if model.layer_of(path) == name}
            params = {model.inner_path(path): torch.empty_like(leaf, device=device) for path, leaf in own.items()}
            kept = {path: leaf for path, leaf in model.state_spec.items() if model.layer_of(path) == name}
            state = {model.inner_path(path): torch.empty_like(leaf, device=device) for path, leaf in kept.items()}
            layers[name], x = _cut_layer(base, name, params, state, x, layouts, entries, natural, axis)
            layouts = list(layers[name].layouts)
    if not any(isinstance(each, Cut) for layer in layers.values() for each in layer.layouts) and not any(
        layer.pieces for layer in layers.values()
    ):
        raise ModelError(
            f"{model.title}: cp={axis.size} cuts tokens, and no layer looks up or projects an entry of the batch with "
            "tokens in dim 1; use cp=1"
        )
    functions = {name: _function(layer) for name, layer in layers.items() if name not in base.stateful}
    stateful = {name: _stateful_function(layers[name]) for name in base.stateful}

    def share(names: Sequence[str], microbatch: Mapping[str, Any]) -> TokenEntries:
        given = named_tensors(base.share(names, microbatch))
        wanted = dict.fromkeys(piece for name in names for piece in layers[name].pieces)
        return TokenEntries(_with_pieces(given, wanted, axis), device_of(microbatch))

    def programs(names: Sequence[str]) -> list[Any]:
        return [(base.programs(names)[0], axis, layouts), *(layers[name] for name in names)]

    return OverTokens(functions, share, programs, base.cut_points, stateful, axis=axis, layers=layers, output=x)


def _cut_layer(
    base: Specialised, name: str, params: Mapping[str, Tensor], state: Mapping[str, Tensor], x: Any,
    layouts: Sequence[Layout | None], entries: Any, natural: Mapping[str, Layout], axis: ContextAxis,
) -> tuple[LocalLayer, Any]:  # fmt: skip
    """Cut one layer; return it, and the whole layer's output on fake tensors."""
    what, whole = f"layer {name!r}", recorded(base, name, params, state, x, entries)
    local = _local(whole, [each for each in layouts if each is not None], natural, axis, what)
    found = [local.layouts.get(number) for number in range(len(local.returned))]
    return _layer(whole, local, local.returned, what, found), whole.made


def _local(
    whole: Traced, layouts: Sequence[Layout], natural: Mapping[str, Layout], axis: ContextAxis, what: str
) -> LocalGraph:  # fmt: skip
    return LocalGraph(whole, dict(zip(whole.received, layouts, strict=True)), natural, axis, what)


def _natural(
    base: Specialised, model: Model, batch: Mapping[str, Any], names: Sequence[str], axis: ContextAxis
) -> dict[str, Layout]:  # fmt: skip
    """Return how the values that layers share would be cut, if entries of the batch were."""

    def share(params: Any, received: Any, given: Mapping[str, Tensor], states: Any) -> tuple[list[Tensor], Any]:
        return list(named_tensors(base.share(list(model.layers), with_tensors(batch, given))).values()), {}

    whole = traced(share, {}, [], named_tensors(batch), {})
    return dict(zip(names, of_shared(whole, axis), strict=True))


def _layer(whole: Traced, local: LocalGraph, returned: Sequence[Any], what: str, layouts: Sequence[Any]) -> LocalLayer:
    pieces = {(name, cut.dim, cut.parts): node for (name, cut), node in local.pieces.items()}
    named = {_piece_name(piece): node for piece, node in pieces.items()}
    segment = segment_of(whole, local.graph, returned, what, named, local.after)
    used = set(segment.shared)
    return LocalLayer(segment, tuple(piece for piece in pieces if _piece_name(piece) in used), tuple(layouts))


def _function(layer: LocalLayer) -> Callable[..., Any]:
    def function(params: Mapping[str, Any], x: Any, entries: TokenEntries) -> Any:
        return layer.segment(params, tensors_in(x), entries.tensors, entries.device, None)[0]

    return function


def _stateful_function(layer: LocalLayer) -> StatefulFunction:
    def function(params: Mapping[str, Any], x: Any, entries: TokenEntries, state: State) -> tuple[Any, State]:
        return layer.segment(params, tensors_in(x), entries.tensors, entries.device, None, state)

    return function


def _piece_name(piece: Piece) -> str:
    name, dim, parts = piece
    return f"{name} {dim} {parts}"


def _with_pieces(given: Mapping[str, Tensor], pieces: Iterable[Piece], axis: ContextAxis) -> dict[str, Tensor]:
    made = {_piece_name(each): own_tokens(given[each[0]], each[1], each[2], axis.ranks) for each in pieces}
    return {**given, **made}


def _fresh(leaf: Tensor) -> Tensor:
    return torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device)

"""Which stages are the same computation, so that one capture serves all: a model of a hundred equal blocks is traced once.

Two functions are the same when their code, defaults, globals and the values in their closures are. What cannot be compared
by value is compared by identity, so a stage is never taken for another by mistake; at worst it is captured once more.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import fields, is_dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from autofunc import tree
from autofunc.captured.segment import Name, Segment
from autofunc.engine.functions import StageContext
from autofunc.splitting import Boundary, Value

_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, type)


def fingerprint(context: StageContext) -> Hashable:
    """Equal for stages that do the same to values of the same shapes.

    Names of layers are left out, unless the microbatch has a key: randomness depends on them. Only for comparing within one
    call, while the functions are alive and their globals stay as they are.
    """
    stage, model = context.stage, context.stage.model
    random = context.microbatch.get("key") is not None
    layers = []
    entries = context.setting.precision.batch(context.microbatch)
    shared, *programs = model.program(stage.layers, entries, context.recast)
    for number, (name, program) in enumerate(zip(stage.layers, programs, strict=True)):
        label = name if random else f"layer {number}"
        own = [path for path in stage.holders if model.layer_of(path) == name]
        params = tuple(
            (
                model.inner_path(path),
                tuple(model.spec[path].shape),
                tuple(context.setting.partitioning.shape(path, model.spec[path].shape)),
                context.dtypes[model.canonical(path)],
                model.is_trainable(path),
            )
            for path in own
        )
        layers.append((label, _Comparer(name, label).key(program), params))
    leaves, spec = tree.leaves_and_spec(dict(context.microbatch))
    microbatch = tuple(
        (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (type(leaf), leaf)
        for leaf in leaves
    )
    loss = _Comparer("", "").key(context.loss) if context.with_loss else None
    edges = (_boundary_key(context.received), _boundary_key(context.returned))
    setting = (id(context.setting.partitioning), context.setting.precision)
    what = (context.with_loss, context.with_grads, context.device, stage.is_last, _Comparer("", "").key(shared))
    return tuple(layers), edges, repr(spec), microbatch, loss, what, setting


def _boundary_key(boundary: Boundary | None) -> Hashable:
    if boundary is None:
        return None
    leaves = (
        (leaf.shape, leaf.dtype, leaf.needs_grad, leaf.placement) if isinstance(leaf, Value) else repr(leaf)
        for leaf in boundary.leaves
    )
    return repr(boundary.spec), tuple(leaves)


class _Comparer:
    """Makes keys of functions and what they close over; the layer's own name counts as its label."""

    def __init__(self, name: str, label: str, *, literal: bool = False) -> None:
        self._name, self._label, self._literal = name, label, literal
        self._open: list[int] = []  # what is being looked at, so that a loop ends

    def key(self, value: Any) -> Hashable:
        if isinstance(value, Name):
            return (Name, self._labelled(value.text))
        if isinstance(value, str) and not self._literal:
            return (str, self._labelled(value))
        if isinstance(value, float):
            return (float, value.hex())  # 0.0 == -0.0
        if isinstance(value, _PLAIN):
            return (type(value), value)
        if isinstance(value, Segment) and not self._literal:  # says itself what is a name
            return _Comparer(self._name, self._label, literal=True).key(value)
        if id(value) in self._open:
            return ("again", self._open.index(id(value)))
        self._open.append(id(value))
        try:
            return self._composite(value)
        finally:
            self._open.pop()

    def _labelled(self, text: str) -> str:
        if self._name and (text == self._name or text.startswith(self._name + ".")):
            return self._label + text[len(self._name) :]
        return text

    def _composite(self, value: Any) -> Hashable:
        if isinstance(value, FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            return (
                value.__code__,
                id(value.__globals__),
                self.key(cells),
                self.key([value.__defaults__, value.__kwdefaults__]),
            )
        if isinstance(value, MethodType):
            return ("method", self.key(value.__func__), self.key(value.__self__))
        if isinstance(value, partial):
            return ("partial", self.key(value.func), self.key(value.args), self.key(value.keywords))
        if type(value) in (list, tuple):
            return (type(value), tuple(self.key(part) for part in value))
        if type(value) is dict:
            return (dict, tuple((self.key(name), self.key(part)) for name, part in value.items()))
        if is_dataclass(value) and not isinstance(value, type):
            return (type(value), tuple(self.key(getattr(value, each.name)) for each in fields(value)))
        return (type(value), id(value))

"""A piece of a captured graph as plain data, and how it runs.

Segments are compared by value: two equal blocks of a model give equal segments, so that a pipeline captures them once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from autofunc import tree
from autofunc.fingerprint import Fingerprint, Fingerprinted, Name
from autofunc.graph.last_use import last_uses


@dataclass(frozen=True)
class Ref:
    """An argument that is a value, by its register."""

    register: int


@dataclass(frozen=True)
class Runtime:
    """An argument that is known when it runs: "device", where the parameters are, or "key", of the microbatch."""

    what: str


def plain(argument: Any, register: Mapping[fx.Node, int]) -> Any:
    """An argument of a node in a graph as one of an instruction.

    Args:
        argument: of the node.
        register: of each node that has one.
    """
    if isinstance(argument, fx.Node):
        return Ref(register[argument])
    if isinstance(argument, torch.device):
        return Runtime("device")
    if isinstance(argument, (list, tuple)):
        return [plain(part, register) for part in argument]
    return argument


@dataclass(frozen=True)
class Instruction:
    """One operator."""

    target: Callable[..., Any]
    args: tuple[Any, ...]  # with `Ref` and `Runtime`
    kwargs: tuple[tuple[str, Any], ...]
    register: int  # of its result
    modes: tuple[tuple[Any, ...], ...] = ()  # ("grad", enabled) or ("autocast", ...) that it runs under


@dataclass(frozen=True, eq=False)
class Segment(Fingerprinted):
    """A piece of a captured graph.

    Registers are filled with parameters, state, received values, shared values and constants, in that order, then by
    instructions.
    """

    params: tuple[str, ...]  # paths inside the layer
    num_received: int
    shared: tuple[str, ...]  # names of values that depend on the batch alone
    constants: tuple[Tensor, ...]
    instructions: tuple[Instruction, ...]
    returned: tuple[Any, ...]  # `Ref`s, or constants
    spec: Any = None  # the pytree that is returned; None: a tuple, or the value itself where there is one
    states: tuple[str, ...] = ()  # paths inside the layer
    new_states: tuple[Ref, ...] = ()  # of each, what it is afterwards
    traces: tuple[str, ...] = ()  # of each instruction, of the user's code, for messages; equal segments may differ in them

    def fingerprint(self, keys: Fingerprint) -> Hashable:
        """By its fields, in which strings are what they are."""
        exact = keys.literally()
        return tuple(exact.of(getattr(self, each.name)) for each in fields(self) if each.name != "traces")

    def __call__(
        self,
        params: Mapping[str, Any],
        received: Sequence[Tensor],
        shared: Mapping[str, Any],
        device: torch.device,
        key: Any,
        state: Mapping[str, Tensor] | None = None,
    ) -> tuple[Any, dict[str, Tensor]]:
        """Run it; returns what it makes, and its state as it is now.

        Args:
            params: nested dicts of the layer's parameters.
            received: values of the layer before.
            shared: by name.
            device: where constants are needed and new tensors are made.
            key: of the microbatch, or None.
            state: of the layer, by path.
        """
        flat, kept = tree.flatten(params), dict(state or {})
        constants = (constant.to(device) for constant in self.constants)
        given = [
            *(flat[path] for path in self.params), *(kept[path] for path in self.states), *received,
            *(shared[name] for name in self.shared), *constants,
        ]  # fmt: skip
        registers: dict[int, Any] = dict(enumerate(given))
        runtime = {"device": device, "key": key}

        def value(argument: Any) -> Any:
            if isinstance(argument, Ref):
                return registers[argument.register]
            if isinstance(argument, Runtime):
                return runtime[argument.what]
            if isinstance(argument, Name):
                return argument.text
            if isinstance(argument, (list, tuple)):
                return type(argument)(value(part) for part in argument)
            return argument

        for instruction, done in zip(self.instructions, self._last_uses, strict=True):
            args = [value(argument) for argument in instruction.args]
            kwargs = {name: value(argument) for name, argument in instruction.kwargs}
            if instruction.modes:
                with ExitStack() as stack:
                    for mode in instruction.modes:
                        stack.enter_context(_entered(mode))
                    registers[instruction.register] = instruction.target(*args, **kwargs)
            else:
                registers[instruction.register] = instruction.target(*args, **kwargs)
            for register in done:
                del registers[register]
        results = [value(each) for each in self.returned]
        kept.update((path, value(after).detach()) for path, after in zip(self.states, self.new_states, strict=True))
        if self.spec is not None:
            return tree.from_leaves(results, self.spec), kept
        return results[0] if len(results) == 1 else tuple(results), kept

    @cached_property
    def _last_uses(self) -> list[list[int]]:
        """For each instruction, the registers that nothing reads after it."""
        steps = [
            (each.register, _registers((each.args, [argument for _, argument in each.kwargs])))
            for each in self.instructions
        ]
        return last_uses(steps, _registers([*self.returned, *self.new_states]))


def _registers(argument: Any) -> list[int]:
    if isinstance(argument, Ref):
        return [argument.register]
    if isinstance(argument, (list, tuple)):
        return [register for part in argument for register in _registers(part)]
    return []


def _entered(mode: tuple[Any, ...]) -> Any:
    kind, *options = mode
    if kind == "grad":
        return torch.set_grad_enabled(*options)
    device_type, dtype, enabled, cache = options
    return torch.autocast(device_type, dtype, enabled, cache)

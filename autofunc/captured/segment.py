"""A piece of a captured graph as plain data, and the way it runs.

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
    """An argument that is a value in a register."""

    register: int


@dataclass(frozen=True)
class Runtime:
    """An argument known only at run time: "device", where the parameters are, or "key", the microbatch's."""

    what: str


def plain(argument: Any, register: Mapping[fx.Node, int]) -> Any:
    """Convert an argument of a graph's node to one of an instruction.

    Args:
        argument: the node's.
        register: the register of each node that has one.
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
    modes: tuple[tuple[Any, ...], ...] = ()  # the ("grad", enabled) or ("autocast", ...) regions it runs under


@dataclass(frozen=True, eq=False)
class Segment(Fingerprinted):
    """A piece of a captured graph.

    Registers are filled with parameters, states, received values, shared values and constants, in that order, then by
    instructions.
    """

    params: tuple[str, ...]  # paths inside the layer
    num_received: int
    shared: tuple[str, ...]  # names of values that depend on the batch and constants alone
    constants: tuple[Tensor, ...]
    instructions: tuple[Instruction, ...]
    returned: tuple[Any, ...]  # `Ref`s, or constants
    spec: Any = None  # the returned pytree; None: a tuple, or the value itself if there is one
    states: tuple[str, ...] = ()  # paths inside the layer
    new_states: tuple[Ref, ...] = ()  # the value of each state afterwards
    traces: tuple[str, ...] = ()  # the user's stack of each instruction, for messages; equal segments may differ in them

    def fingerprint(self, keys: Fingerprint) -> Hashable:
        """Of its fields except `traces`, with strings compared literally."""
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
        """Run it; return its result and its new state.

        Args:
            params: nested dicts of the layer's parameters.
            received: the values from the layer before.
            shared: shared values by name.
            device: where constants are used and new tensors are made.
            key: the microbatch's, or None.
            state: the layer's, by path.
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
        """For each instruction, the registers that nothing reads afterwards."""
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

"""Weights and buffers of a module on the meta device, made by the module's own initialisers, a part at a time.

The module stays on the meta device. Parts of it are stood in for by shells: objects of the same class and settings with
real tensors of their own, on which `reset_parameters`, or the `_init_weights(part)` of a part above (the way of
transformers and nanoGPT), is called. The generator is seeded from (seed, path of the part), so values do not depend on the
layout.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from autofunc.errors import ModelError
from autofunc.random import InitKey


def initial_weights(module: nn.Module, paths: Iterable[str], seed: int) -> dict[str, Tensor]:
    """Values for parameters, by canonical path, on the CPU.

    Raises:
        ModelError: when no initialiser fills one.
    """
    owners: dict[str, list[str]] = {}
    for path in paths:
        owner, _, name = path.rpartition(".")
        owners.setdefault(owner, []).append(name)
    made = {}
    for owner, names in owners.items():
        shell = _shell(module, owner)
        blank = {name: nn.Parameter(_blank(getattr(shell, name))) for name in names}
        shell._parameters.update(blank)
        _initialise(module, owner, shell, seed)
        for name, leaf in blank.items():
            if leaf.isnan().any():
                raise ModelError(
                    f"{type(shell).__name__} ({owner or 'the module itself'}) is on the meta device, and neither its "
                    f"reset_parameters nor an _init_weights of a module above fills {name!r}; define one, build it with "
                    "real weights, or load weights from a file"
                )
            made[f"{owner}.{name}" if owner else name] = leaf.detach()
    return made


def initial_buffer(module: nn.Module, path: str) -> Tensor:
    """The value of a buffer that is on the meta device.

    Raises:
        ModelError: when no initialiser makes it.
    """
    owner, _, name = path.rpartition(".")
    shell = _shell(module, owner)
    for other, buffer in shell._buffers.items():
        if buffer is not None:
            shell._buffers[other] = _blank(buffer)
    _initialise(module, owner, shell, 0)
    value = shell._buffers[name]
    untouched = value is None or value.is_meta or (value.is_floating_point() and bool(value.isnan().any()))
    if untouched:
        raise ModelError(
            f"the buffer {path!r} of {type(shell).__name__} is on the meta device, and no initialiser makes it; build the "
            "module with af.empty_weights(), which keeps buffers real: with af.empty_weights(): module = ..."
        )
    assert value is not None
    return value


def _blank(leaf: Tensor) -> Tensor:
    """A tensor that shows whether it was filled."""
    filler = float("nan") if leaf.is_floating_point() else 0
    return torch.full(leaf.shape, filler, dtype=leaf.dtype, device="cpu")


def _shell(module: nn.Module, name: str) -> nn.Module:
    """An object like the part with this name, whose tensors can be set without touching the part."""
    part = module.get_submodule(name)
    shell = copy.copy(part)
    shell._parameters, shell._buffers = dict(part._parameters), dict(part._buffers)
    return shell


def _initialise(module: nn.Module, owner: str, shell: nn.Module, seed: int) -> None:
    """Run what initialises a part: its own `reset_parameters`, then the `_init_weights` of the nearest part above."""
    parts = owner.split(".") if owner else []
    above = [module.get_submodule(".".join(parts[:count])) for count in range(len(parts), -1, -1)]
    with _seeded(seed, owner), torch.no_grad():
        reset = getattr(shell, "reset_parameters", None)
        if callable(reset):
            reset()
        for each in dict.fromkeys(above):
            initialise = getattr(each, "_init_weights", None)
            if callable(initialise):
                initialise(shell)
                return


@contextmanager
def _seeded(seed: int, path: str) -> Iterator[None]:
    state = torch.get_rng_state()
    torch.manual_seed(InitKey(seed, path).generator("").initial_seed())
    try:
        yield
    finally:
        torch.set_rng_state(state)

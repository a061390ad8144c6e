"""Weights and buffers of a module on the meta device, made by the module's own initialisers, one part at a time.

The module stays on the meta device. Shells stand in for its parts: objects of the same class and settings, but with real
tensors. On these, `reset_parameters` and the `_init_weights(part)` of enclosing parts (as in transformers and nanoGPT) are
called. The generator is seeded from (seed, path of the part), so values do not depend on the
layout.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from autofunc.errors import ModelError
from autofunc.random import InitKey


def initial_weights(module: nn.Module, paths: Iterable[str], seed: int) -> dict[str, Tensor]:
    """Return initial values of parameters, by canonical path, on the CPU.

    Raises:
        ModelError: if no initialiser fills one of them.
    """
    owners: dict[str, list[str]] = {}
    for path in paths:
        owner, _, name = path.rpartition(".")
        owners.setdefault(owner, []).append(name)
    made = {}
    for owner, names in owners.items():
        shells = _shells(module, owner)
        blank = {name: nn.Parameter(_blank(getattr(shells[-1], name))) for name in names}
        shells[-1]._parameters.update(blank)
        _initialise(shells, owner, seed)
        for name, leaf in blank.items():
            if leaf.isnan().any():
                raise ModelError(
                    f"{type(shells[-1]).__name__} ({owner or 'the module itself'}) is on the meta device, and neither its "
                    f"reset_parameters nor an _init_weights of a module above fills {name!r}; define one, build it with "
                    "real weights, or load weights from a file"
                )
            made[f"{owner}.{name}" if owner else name] = leaf.detach()
    return made


def initial_buffer(module: nn.Module, path: str) -> Tensor:
    """Return the value of a buffer that is on the meta device.

    Raises:
        ModelError: if no initialiser makes it.
    """
    owner, _, name = path.rpartition(".")
    shells = _shells(module, owner)
    buffers = shells[-1]._buffers
    blank = {other: _blank(buffer) for other, buffer in buffers.items() if buffer is not None}
    buffers.update(blank)
    _initialise(shells, owner, 0)
    value = buffers[name]
    filled = value is not None and not value.is_meta and (value is not blank[name] or _was_filled(value))
    if value is None or not filled:
        raise ModelError(
            f"the buffer {path!r} of {type(shells[-1]).__name__} is on the meta device, and no initialiser makes it; build "
            "the module with its buffers: with af.empty_weights(): module = ..."
        )
    return value


_UNLIKELY = -7  # fills blank integers, which cannot hold NaN


def _blank(leaf: Tensor) -> Tensor:
    """Return a tensor whose contents show whether it was filled."""
    filler = float("nan") if leaf.is_floating_point() else leaf.dtype != torch.bool and _UNLIKELY
    return torch.full(leaf.shape, filler, dtype=leaf.dtype, device="cpu")


def _was_filled(value: Tensor) -> bool:
    if value.dtype == torch.bool:
        return bool(value.any())
    return not bool((value.isnan() if value.is_floating_point() else value == _UNLIKELY).any())


def _shells(module: nn.Module, name: str) -> list[nn.Module]:
    """Return shells of the module, the part with this name and all between, whose tensors can be set independently."""
    shells = [_shell(module)]
    for key in name.split(".") if name else ():
        shell = _shell(shells[-1].get_submodule(key))
        shells[-1]._modules[key] = shell
        shells.append(shell)
    return shells


def _shell(part: nn.Module) -> nn.Module:
    shell = copy.copy(part)
    # through its namespace: attributes set on torch.compile's wrapper go to the wrapped module
    vars(shell).update({space: dict(vars(part)[space]) for space in ("_parameters", "_buffers", "_modules")})
    return shell


def _initialise(shells: Sequence[nn.Module], owner: str, seed: int) -> None:
    """Initialise a part: call its own `reset_parameters`, then `_init_weights` on it and on each enclosing part.

    Each part is initialised by the nearest `_init_weights` at or above it, innermost first, as `apply` would.
    The other parts' tensors are on the meta device, where initialising has no effect.
    """
    with _seeded(seed, owner), torch.no_grad(), torch.device("cpu"):
        # torch's attention and transformers spell it with an underscore
        for name in ("reset_parameters", "_reset_parameters"):
            reset = getattr(shells[-1], name, None)
            if callable(reset):
                reset()
                break
        for depth in range(len(shells) - 1, -1, -1):
            above = (getattr(shell, "_init_weights", None) for shell in reversed(shells[: depth + 1]))
            initialise = next((each for each in above if callable(each)), None)
            if initialise is not None:
                initialise(shells[depth])


@contextmanager
def _seeded(seed: int, path: str) -> Iterator[None]:
    state = torch.get_rng_state()
    torch.manual_seed(InitKey(seed, path).generator("").initial_seed())
    try:
        yield
    finally:
        torch.set_rng_state(state)

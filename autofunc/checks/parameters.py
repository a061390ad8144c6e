"""C1: parameters belong to the modules that use them, in a form that can be sharded.

`fully_shard` gathers the parameters of a layer when the layer's forward begins and frees them when it ends. It refuses
0-dim parameters, strided ones, and layers with several dtypes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from autofunc.checks.subject import Subject
from autofunc.checks.verdict import Status, Verdict, where

_STATE = ("_parameters", "_buffers", "_modules")
_CONTAINERS = (nn.ParameterList, nn.ParameterDict)


def check_parameters(subject: Subject) -> list[Verdict]:
    """Return the findings of C1."""
    if subject.module is None:
        return [Verdict("C1", "skip", "a model of pure layers has no modules that could own parameters")]
    found = [*_unregistered(subject.module), *_forms(subject.module), *_dtypes(subject), *_elsewhere(subject)]
    return found or [Verdict("C1", "pass", "all parameters can be sharded, and are read while their own layers run")]


def _unregistered(module: nn.Module) -> Iterator[Verdict]:
    """Yield parameters that `module.parameters()` misses because they are not registered."""
    registered = {id(leaf) for leaf in module.parameters()} | {id(part) for part in module.modules()}
    for name, part in module.named_modules():
        for attribute, value in vars(part).items():
            if attribute in _STATE:
                continue
            kind = next((kind for kind in _hidden(value, registered)), None)
            if kind is not None:
                advice = {
                    "module": "modules that are not registered; use nn.ModuleList or nn.ModuleDict",
                    "parameter": "a parameter that is not registered; use nn.ParameterList, or assign it directly",
                    "tensor": "a tensor that requires a gradient and is not registered; make it an nn.Parameter",
                    "result": "a result with its autograd graph; return it instead",
                }[kind]
                yield Verdict("C1", "fail", f"{attribute!r} holds {advice}", where(type(part), name))


def _hidden(value: Any, registered: set[int], depth: int = 0) -> Iterator[str]:
    if id(value) in registered:
        return
    if isinstance(value, Tensor):
        if value.requires_grad:
            yield "parameter" if isinstance(value, nn.Parameter) else "tensor" if value.is_leaf else "result"
    elif isinstance(value, nn.Module):
        if any(id(leaf) not in registered for leaf in value.parameters()):
            yield "module"
    elif isinstance(value, (list, tuple, set, deque, dict)) and depth < 3:
        for member in list(value.values()) if isinstance(value, dict) else value:
            yield from _hidden(member, registered, depth + 1)


def _forms(module: nn.Module) -> Iterator[Verdict]:
    """Yield parameters that are not plain dense floating-point tensors."""
    for name, part in module.named_modules():
        for attribute, leaf in part._parameters.items():
            if leaf is None:
                continue
            finding = _form(leaf)
            if finding is not None:
                status, what = finding
                yield Verdict("C1", status, f"the parameter {attribute!r} {what}", where(type(part), name))


def _form(leaf: Tensor) -> tuple[Status, str] | None:
    if leaf.dim() == 0:
        return "warn", "is 0-dim, which FSDP2 refuses to shard; give it the shape (1,)"
    if leaf.is_quantized:
        return "fail", f"is quantised ({leaf.dtype}); quantise after training"
    if leaf.layout != torch.strided or not leaf.is_contiguous():
        return "fail", "is not contiguous in memory; use tensor.contiguous()"
    if leaf.is_complex():
        return "warn", f"is complex ({leaf.dtype}), which few collectives and kernels take; keep real and imaginary parts"
    if not leaf.is_floating_point():
        return "warn", f"is not floating point ({leaf.dtype}), so it is not trained; make it a buffer"
    return None


def _dtypes(subject: Subject) -> Iterator[Verdict]:
    """Yield layers whose trained parameters have several dtypes."""
    assert subject.module is not None
    units: dict[str, dict[torch.dtype, str]] = {}
    for name, leaf in subject.trainable.items():
        units.setdefault(_unit(subject, name), {}).setdefault(leaf.dtype, name)
    for unit, dtypes in units.items():
        if len(dtypes) > 1:
            listed = ", ".join(f"{name} is {str(dtype).removeprefix('torch.')}" for dtype, name in dtypes.items())
            text = f"one layer has parameters of several dtypes ({listed}), which cannot be sharded together"
            yield Verdict("C1", "fail", text, subject.where_of(unit))


def _elsewhere(subject: Subject) -> Iterator[Verdict]:
    """Yield parameters that are read while a module of another layer runs."""
    assert subject.module is not None
    owners: dict[int, list[str]] = {}
    for name, leaf in subject.module.named_parameters(remove_duplicate=False):
        owners.setdefault(id(leaf), []).append(_owner(subject.module, name))
    for name, readers in subject.first.watched.reads.items():
        own = owners[id(subject.params[name])]
        for reader in sorted({running[-1] for running in readers if not set(own) & set(running)}):
            if any(_unit(subject, reader) == _unit(subject, each) for each in own):
                continue
            at = subject.where_of(reader)
            text = (
                f"{at.class_name} reads {name!r} while {own[0] or 'the module'!r}, which owns it, does not run; sharded "
                "parameters are gathered only while their owner's layer runs. A pipeline ties it"
            )
            yield Verdict("C1", "warn", text, at)


def _owner(module: nn.Module, parameter: str) -> str:
    """Return the module whose forward should read a parameter: its owner, or the module that holds its parameter list."""
    owner = parameter.rpartition(".")[0]
    while owner and isinstance(module.get_submodule(owner), _CONTAINERS):
        owner = owner.rpartition(".")[0]
    return owner


def _unit(subject: Subject, name: str) -> str:
    """Return the layer that a parameter or a module belongs to; empty if it is outside all layers."""
    return next((layer for layer in subject.layers if f"{name}.".startswith(f"{layer}.")), "")

"""P5: each parameter can be initialised separately, so the module can be built without memory, a layer at a time."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from autofunc.captured.initial import initial_weights
from autofunc.checks.subject import Subject
from autofunc.checks.verdict import Verdict, where
from autofunc.errors import ModelError, in_brief


def check_empty_build(subject: Subject) -> list[Verdict]:
    """Return the findings of P5."""
    if subject.module is None:
        return [Verdict("P5", "pass", "layers initialise their parameters themselves, one by one")]
    try:
        empty = _without_memory(subject)
    except Exception as error:  # modules define how they are copied
        text = f"cannot be copied to the meta device ({in_brief(error)})"
        return [Verdict("P5", "warn", text, subject.where)]
    missing: dict[type, list[str]] = {}
    reasons: dict[type, str] = {}
    for path in dict(empty.named_parameters()):
        owner, _, name = path.rpartition(".")
        cls = type(empty.get_submodule(owner))
        try:
            initial_weights(empty, [path], 0)
        except ModelError:
            missing.setdefault(cls, []).append(path)
            reasons[cls] = f"has no reset_parameters, nor a module above it an _init_weights, that fills {name!r}"
        except Exception as error:  # the user's initialisers may raise anything
            missing.setdefault(cls, []).append(path)
            reasons[cls] = f"cannot be initialised separately: {in_brief(error)}"
    found = []
    for cls, paths in missing.items():
        text = f"{cls.__name__} {reasons[cls]} ({len(paths)} in all), so its weights must be real or come from a file"
        found.append(Verdict("P5", "warn", text, where(cls, paths[0].rpartition(".")[0])))
    return found or [Verdict("P5", "pass", "every parameter can be initialised separately from the meta device")]


def _without_memory(subject: Subject) -> nn.Module:
    """Copy the module with its tensors on the meta device, allocating nothing for them."""
    assert subject.module is not None and subject.snapshot is not None
    memo = {id(tensor): _empty(tensor) for tensor in [*subject.snapshot.tensors, *subject.module.buffers()]}
    copied: nn.Module = copy.deepcopy(subject.module, memo)
    return copied


def _empty(tensor: Tensor) -> Tensor:
    made = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made

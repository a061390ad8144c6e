"""Any `nn.Module` as a model of named layers."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autofunc.captured.captures import Branches, Captures
from autofunc.captured.compiled_parts import is_compiled
from autofunc.captured.filled import filled
from autofunc.captured.model import CapturedModel
from autofunc.captured.module_source import ModuleSource
from autofunc.captured.pretrained import Pretrained, SafetensorsWeights, Weights
from autofunc.errors import ModelError, some_of


def capture_module(
    module: nn.Module | Pretrained,
    example_batch: Mapping[str, Any],
    *,
    inputs: Sequence[str] | Mapping[str, str] | None = None,
    trainable: Sequence[str] | None = None,
    weights: str | Path | None = None,
    branches: Branches = "example",
) -> CapturedModel:
    """See `af.from_module`, which can also compare the module with its capture."""
    stored: Weights | None = None
    if isinstance(module, Pretrained):
        stored, trainable = module.weights, module.trainable if trainable is None else trainable
        module = module.module
    if weights is not None:
        stored = SafetensorsWeights(weights, module)
    module, wrappers = _unwrapped(module)
    source = ModuleSource(module, inputs, stored, keep_real=weights is None)
    model = CapturedModel(
        Captures(source, branches), example_batch, config=getattr(module, "config", None),
        trainable=("*",) if trainable is None else trainable,
        notes=[
            *(f"{wrapper} around {source.what} is dropped: the pipeline does its work" for wrapper in wrappers),
            *_notes_of_parts(module),
        ],
    )  # fmt: skip
    used = model.used
    frozen = any(not leaf.requires_grad for leaf in source.parameters.values())
    if trainable is None and frozen:  # names, not patterns
        model.trainable = tuple(glob.escape(name) for name in used if source.parameters[name].requires_grad)
    if isinstance(stored, SafetensorsWeights) and weights is not None:
        stored.check(name for name in source.parameters if name in used)
    return model


def _unwrapped(module: nn.Module) -> tuple[nn.Module, list[str]]:
    """Return the module inside wrappers for compilation or data parallelism, and the wrappers' class names."""
    inside = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
    found = []
    while type(module).__module__.startswith("torch.") and type(module).__name__ in inside:
        found.append(type(module).__name__)
        module = module.get_submodule(inside[found[-1]])
    return module, found


def _notes_of_parts(module: nn.Module) -> list[str]:
    """Return notes for the user about parts that are not called plainly."""
    compiled = [name for name, part in module.named_modules() if is_compiled(part)]
    replaced = [name for name, part in module.named_modules() if "forward" in vars(part) and name not in compiled]
    found = []
    if compiled:
        found.append(f"torch.compile around {_listed(compiled)} is dropped: pass compile=True to af.pipeline instead")
    if replaced:
        found.append(
            f"{_listed(replaced)} run forwards that replace those of their classes, as accelerate's hooks do: their tensor "
            "operations are captured, any other effect happens once"
        )
    return found


def _listed(names: Sequence[str]) -> str:
    return some_of(name or "the module itself" for name in names)


def source_of(model: CapturedModel | Pretrained | nn.Module) -> ModuleSource:
    """Return the source of a model's module and values.

    Raises:
        ModelError: for a model captured from a function.
    """
    if isinstance(model, Pretrained):
        return ModuleSource(model.module, stored=model.weights, keep_real=True)
    if not isinstance(model, CapturedModel):
        return ModuleSource(model)
    if not isinstance(model._source, ModuleSource):
        raise ModelError(f"{model._source.what} is a function; expected a model made by af.from_module")
    return model._source


def with_values(model: Pretrained | nn.Module, seed: int = 0) -> nn.Module:
    """Return the module itself if all its parameters are real; else a copy, read from files or initialised by the seed."""
    module = model.module if isinstance(model, Pretrained) else model
    if not any(leaf.is_meta for leaf in module.parameters()):
        return module
    source = source_of(model)
    made: nn.Module = filled(source, source.weights(list(source.parameters), seed, torch.device("cpu"), None))
    return made

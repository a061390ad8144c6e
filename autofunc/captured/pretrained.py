"""A module without values, and its weights, found by name in safetensors files."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from autofunc.captured.stored_tensors import StoredTensors
from autofunc.errors import ModelError, one_of, some_of
from autofunc.model.stored import misfit
from autofunc.shown import quoted, shown


class Weights(Protocol):
    """Stored values of a module's parameters and buffers."""

    @property
    def note(self) -> str | None:
        """A note for the user if they are read in an unusual way, else None."""
        ...

    def __contains__(self, name: object) -> bool: ...

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return values on the CPU, by the module's names; they may be views of files."""
        ...


@dataclass(frozen=True)
class Pretrained:
    """A module without values, and where its values are stored; `af.from_module` takes it in place of a module."""

    module: nn.Module
    weights: Weights
    trainable: tuple[str, ...] | None = None  # patterns of the parameters that get gradients; None: see `af.from_module`


class ConvertedForm(ModelError):
    """A file stores weights in another form than the module's, so that they cannot be found by name."""


class SafetensorsWeights:
    """A module's weights in safetensors files, found by name.

    A stored name may be any of a parameter's names, with or without the module's `base_model_prefix`, or a name that
    transformers maps to it. Persistent buffers are found too.

    Args:
        stored: the files, or their path (see `StoredTensors`).
        module: the module whose names and shapes they must have; it may be on the meta device.

    Raises:
        ConvertedForm: if transformers would compute weights from the stored tensors.
        ModelError: for a stored tensor that has no place in the module, or a shape or dtype that does not fit.
    """

    note: str | None = None

    def __init__(self, stored: StoredTensors | str | Path, module: nn.Module) -> None:
        self._tensors = stored if isinstance(stored, StoredTensors) else StoredTensors(stored)
        self._what = f"{shown(self._tensors.path)} does not fit {type(module).__name__}"
        parameters = dict(module.named_parameters())
        first = {id(leaf): name for name, leaf in [*parameters.items(), *module.named_buffers()]}
        state = {**module.state_dict(keep_vars=True), **dict(module.named_parameters(remove_duplicate=False))}
        leaves = {name: leaf for name, leaf in state.items() if isinstance(leaf, Tensor)}
        self._canonical = {name: first.get(id(leaf), name) for name, leaf in leaves.items()}
        self._optional = _patterns(module, "_keys_to_ignore_on_load_missing")
        self._stored: dict[str, list[str]] = {}
        wrong, extra, unlike = [], [], []
        for name, own in _own_names(self._tensors, module, leaves).items():
            if own is None:
                extra.append(name)
            elif self._tensors.shapes[name] != tuple(leaves[own].shape):
                wrong.append(f"{quoted(name)} is {self._tensors.shapes[name]}, not {tuple(leaves[own].shape)}")
            elif (words := misfit(self._tensors.dtypes[name], leaves[own].dtype)) is not None:
                unlike.append(f"{quoted(name)} {words}")
            else:
                self._stored.setdefault(self._canonical[own], []).append(name)
        if extra:
            places = [name for name in parameters if name not in self._stored] or parameters
            near = one_of(extra[0], places)
            raise ModelError(f"{self._what}: the module has no place for {some_of(extra, 5)}; {near}")
        if wrong:
            raise ModelError(f"{self._what}: {some_of(wrong, 5)}. Are the sizes in its config those of these weights?")
        if unlike:
            raise ModelError(f"{self._what}: {some_of(unlike, 2)}; convert them, or leave them out")

    def __contains__(self, name: object) -> bool:
        return self._canonical.get(str(name)) in self._stored

    def check(self, names: Iterable[str]) -> None:
        """Refuse parameters that are not stored.

        Raises:
            ModelError: naming them.
        """
        missing = [name for name in names if name not in self and not any(each.search(name) for each in self._optional)]
        if missing:
            near = one_of(missing[0], self._tensors.shapes)
            raise ModelError(f"{self._what}: it has no {some_of(missing, 5)}; {near}")

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """See `Weights.read`.

        Raises:
            ModelError: for a tied parameter that is stored under several names with different values.
        """
        copies = {name: self._stored[self._canonical[name]] for name in names}
        values = self._tensors.read(dict.fromkeys(each for several in copies.values() for each in several))
        for name, (one, *others) in copies.items():
            for other in others:
                if not torch.equal(values[one], values[other]):
                    raise ModelError(
                        f"{shown(self._tensors.path)}: {one!r} and {other!r} have different values, but in the module they "
                        f"are one parameter ({name!r}); untie them in its config (tie_word_embeddings: false)"
                    )
        return {name: values[several[0]] for name, several in copies.items()}


def _own_names(stored: StoredTensors, module: nn.Module, leaves: Mapping[str, Tensor]) -> dict[str, str | None]:
    """Map each stored name to the module's, or to None if it has no place; names that may be left over are omitted."""
    ignored = _patterns(module, "_keys_to_ignore_on_load_unexpected")
    temporary = {name for name, _ in module.named_buffers(remove_duplicate=False)} - leaves.keys()
    renamed = _names_in_transformers(stored, module, leaves)
    prefix = str(getattr(module, "base_model_prefix", "") or "")
    found: dict[str, str | None] = {}
    for name in stored.shapes:
        given = renamed.get(name, name)
        tried = [given, given.removeprefix(prefix + "."), f"{prefix}.{given}"] if prefix else [given]
        own = next((each for each in tried if each in leaves), None)
        # older versions stored buffers that are now computed
        if own is not None or not (temporary.intersection(tried) or any(each.search(given) for each in ignored)):
            found[name] = own
    return found


def _names_in_transformers(stored: StoredTensors, module: nn.Module, leaves: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the names transformers gives to the tensors it stored, when it loads them into one of its models."""
    transformers = sys.modules.get("transformers")  # imported already if the module is one of its classes
    if transformers is None or not isinstance(module, transformers.PreTrainedModel) or not stored.by_transformers:
        return {}
    try:
        # internals of transformers (tried with 5.23); if they are missing, it has to load the model itself
        from transformers import conversion_mapping, core_model_loading

        rules = conversion_mapping.get_model_conversion_mapping(module)
        renamings = [rule for rule in rules if isinstance(rule, core_model_loading.WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, core_model_loading.WeightConverter)]
        found = {name: core_model_loading.rename_source_key(name, renamings, converters) for name in stored.shapes}
    except Exception as error:
        raise ConvertedForm(f"cannot find out how transformers loads {type(module).__name__}: {error}") from error
    converted = [name for name, (own, rule) in found.items() if rule is not None and (own in leaves or name not in leaves)]
    if converted:
        raise ConvertedForm(
            f"{stored.path} stores {type(module).__name__} in another form than the module has ({converted[0]!r} and "
            f"{len(converted) - 1} more are converted while loading); load it with af.AutoModel.from_pretrained"
        )
    return {name: own for name, (own, _) in found.items() if own in leaves or name not in leaves}


def _patterns(module: nn.Module, attribute: str) -> list[re.Pattern[str]]:
    return [re.compile(pattern) for pattern in getattr(module, attribute, None) or ()]

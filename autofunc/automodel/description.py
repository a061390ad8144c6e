"""Descriptions of models read from config.json, and the config object that a registered class takes."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from autofunc.errors import ModelError, in_brief, one_of, some_of
from autofunc.foreign_file import NOT_THERE, is_folder, read_json, unfit
from autofunc.shown import quoted, reason, shown

CONFIG = "config.json"

_ABOUT = frozenset(
    ("architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "auto_map", "_name_or_path")
)
"""Keys that identify a model rather than size it."""


def _is_names(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, Sequence) and all(isinstance(each, str) for each in value))


def _is_map(value: object) -> bool:
    """Return whether a value maps names to classes; a tokenizer has two classes, one of which may be missing."""
    if not isinstance(value, Mapping):
        return False
    return all(
        isinstance(each, str) or (isinstance(each, Sequence) and "Tokenizer" in name) for name, each in value.items()
    )


_KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "architectures": (_is_names, 'a list of names, such as ["MyCustomForCausalLM"]'),
    "model_type": (lambda value: isinstance(value, str), "a name, such as gpt2"),
    "auto_map": (
        _is_map,
        'names of classes, such as {"AutoModelForCausalLM": "modeling.MyCustomForCausalLM"}',
    ),
}
"""(check, expected form in words) for keys that identify a model."""

_FLOATS = {str(each).removeprefix("torch."): each for each in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}


@dataclass(frozen=True)
class Description:
    """What is known about a model before it is built.

    Raises:
        ModelError: if a key that identifies the model has the wrong type.
    """

    values: Mapping[str, Any]  # as in config.json, overrides included
    before: Mapping[str, Any]  # without the overrides
    overrides: Mapping[str, Any]
    given: Any  # the config object, if one was given
    folder: Path | None  # of its config.json
    what: str  # its name in error messages

    @property
    def architecture(self) -> str | None:
        """The first of `architectures`; None if absent."""
        named = self.values.get("architectures")
        named = [named] if isinstance(named, str) else named or []
        return named[0] if named else None

    @property
    def model_type(self) -> str | None:
        """Its `model_type`; None if absent."""
        return self.values.get("model_type") or None

    @property
    def auto_map(self) -> Mapping[str, str]:
        """The classes of its own code, by the transformers auto class that each implements."""
        return {name: place for name, place in (self.values.get("auto_map") or {}).items() if isinstance(place, str)}

    def __post_init__(self) -> None:
        for key, (is_right, expected) in _KINDS.items():
            given = self.values.get(key)
            if given is not None and not is_right(given):
                raise ModelError(f"{self.what}: {key} is {quoted(given)}; expected {expected}")

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of floating-point parameters; None if absent.

        Raises:
            ModelError: if it is not a known floating-point dtype.
        """
        named = self.values.get("dtype") or self.values.get("torch_dtype")
        if named is None or isinstance(named, torch.dtype):
            return named
        found = _FLOATS.get(str(named).removeprefix("torch."))
        if found is None:
            raise ModelError(f"{self.what}: dtype {quoted(named)} is not a floating-point dtype; {one_of(named, _FLOATS)}")
        return found


def describe(config: Any, overrides: Mapping[str, Any], find_folder: Callable[[str], Path]) -> Description:
    """Read a description.

    Args:
        config: a mapping, a config object, a config.json or its folder, or the name of a model.
        overrides: keys with new values.
        find_folder: returns the folder of a model's name.

    Raises:
        ModelError: if config.json is missing or invalid.
    """
    folder, given, what = None, None, "config"
    if isinstance(config, (str, Path)):
        what, path = shown(config), Path(config).expanduser()
        file = path if unfit(path) is None else (path if is_folder(path) else find_folder(str(config))) / CONFIG
        folder, values = file.parent, _read(file)
    elif isinstance(config, Mapping):
        values = dict(config)
    else:
        given, what, values = config, type(config).__name__, values_of(config)
    changes = {key: str(value).removeprefix("torch.") if key == "dtype" else value for key, value in overrides.items()}
    return Description({**values, **changes}, values, changes, given, folder, what)


def values_of(config: Any) -> dict[str, Any]:
    """Return a config (a mapping, a dataclass, or an object with `to_dict` or attributes) as a dict.

    Raises:
        ModelError: for anything else.
    """
    if isinstance(config, Mapping):
        return dict(config)
    if callable(getattr(config, "to_dict", None)):
        return dict(config.to_dict())
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return dataclasses.asdict(config)
    if hasattr(config, "__dict__") and not isinstance(config, (type, nn.Module)):
        return dict(vars(config))
    raise ModelError(
        f"expected a config (a mapping, a config object, a folder with a {CONFIG}, or the name of a model), "
        f"got {type(config).__name__}"
    )


def config_for(cls: type[nn.Module], description: Description) -> Any:
    """Return the config that a registered class is called with.

    Its type is the class's `config_class`; else the annotation of the first argument, if that is a dataclass, a class with
    `from_dict`, or a dict; else a namespace with the keys of the config.json.

    Raises:
        ModelError: for keys that the type does not have, and required keys that are missing.
    """
    wanted = getattr(cls, "config_class", None) or _annotated(cls)
    given, overrides, values = description.given, description.overrides, description.values
    if wanted is dict:
        return dict(values)
    if given is not None and (wanted is None or isinstance(given, wanted)):
        return changed(given, overrides, description.what)
    if wanted is None:
        _check_keys(cls, overrides, description.before, description)
        return SimpleNamespace(**values)
    if callable(getattr(wanted, "from_dict", None)):
        return from_dict(wanted, description)
    if dataclasses.is_dataclass(wanted):
        known = {each.name for each in dataclasses.fields(wanted) if each.init}
        _check_keys(cls, [key for key in values if key not in _ABOUT], known, description)
        values = {key: value for key, value in values.items() if key in known}
    try:
        return wanted(**values)
    except TypeError as error:
        raise ModelError(
            f"{description.what}: {wanted.__name__}, the config of {cls.__name__}, says {reason(error)}"
        ) from error


def changed(config: Any, overrides: Mapping[str, Any], what: str) -> Any:
    """Return a copy of a config object with new values.

    Raises:
        ModelError: for keys that it does not have.
    """
    copied = copy.deepcopy(config)
    for key, value in overrides.items():
        try:
            setattr(copied, _attribute(copied, key, what), value)
        except dataclasses.FrozenInstanceError:
            object.__setattr__(copied, key, value)
    return copied


def from_dict(config_class: Any, description: Description) -> Any:
    """Build a config with its class's `from_dict`.

    Raises:
        ModelError: if the class refuses the values, or for overrides of keys that it does not have.
    """
    overrides = description.overrides
    try:
        made = config_class.from_dict(dict(description.values))
    except Exception as error:
        raise ModelError(f"{description.what}: {config_class.__name__}: {in_brief(error)}") from error
    plain = made
    with suppress(Exception):  # without the overrides required keys may be missing
        plain = config_class.from_dict(dict(description.before))
    for key in overrides:
        _attribute(plain, key, description.what)
    return made


def _attribute(config: Any, key: str, what: str) -> str:
    """Return the attribute that holds a key of a config; transformers prefixes some with an underscore."""
    name = next((each for each in (key, "_" + key) if hasattr(config, each)), key if key in _ABOUT else None)
    if name is None:
        raise ModelError(f"{what}: {type(config).__name__} has no {quoted(key)}; {one_of(key, sorted(values_of(config)))}")
    return name


def _check_keys(cls: type, keys: Any, known: Any, description: Description) -> None:
    for key in keys:
        if key not in known and key not in _ABOUT:
            raise ModelError(
                f"{description.what}: the config of {cls.__name__} has no {quoted(key)}; {one_of(key, sorted(known))}"
            )


def _annotated(cls: type[nn.Module]) -> Any:
    """Return the type that annotates the first argument of `__init__`, if it is a config type."""
    arguments = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
    try:
        found = typing.get_type_hints(cls.__init__).get(arguments[0]) if arguments else None
    except NameError:  # an annotation that only a type checker can resolve
        return None
    origin = typing.get_origin(found) or found
    if origin in (dict, Mapping):
        return dict
    is_config = isinstance(found, type) and (dataclasses.is_dataclass(found) or callable(getattr(found, "from_dict", None)))
    return found if is_config else None


def _read(file: Path) -> dict[str, Any]:
    if unfit(file) == NOT_THERE:
        found = some_of(sorted(each.name for each in file.parent.iterdir()), 12) if is_folder(file.parent) else ""
        raise ModelError(f"there is no {shown(file)}; {shown(file.parent)} has {found or 'nothing'}")
    values = read_json(file, ModelError)
    if not isinstance(values, dict):
        raise ModelError(f"{shown(file)}: expected an object with keys, got {type(values).__name__}")
    return values

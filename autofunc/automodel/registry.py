"""The registry of architectures: a table from names to classes, filled only by registration."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import TypeVar, overload

from torch import nn

from autofunc.errors import ModelError, in_brief

GROUP = "autofunc.architectures"
"""Entry points by which an installed package registers its models: `MyCustomForCausalLM = "my_package.models:Class"`."""

_HEAD = re.compile(r"(For[A-Z]\w*|LMHeadModel|Model)$")

ModelClass = TypeVar("ModelClass", bound=type[nn.Module])


def follows_convention(name: str) -> bool:
    """Return whether a class is named like a model: `MyCustomForCausalLM`, `MyCustomLMHeadModel`, `MyCustomModel`."""
    return bool(_HEAD.search(name)) and not name.startswith("_") and not name.lower().endswith("pretrainedmodel")


def model_type_of(name: str) -> str:
    """Return the `model_type` that matches an architecture's name: `my_custom` for `MyCustomForCausalLM`."""
    stem = _HEAD.sub("", name) or name
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", stem).lower()


class Registry:
    """Architectures by name.

    Args:
        group: of entry points, read once at the first lookup of a name; None reads none.
    """

    def __init__(self, group: str | None = None) -> None:
        self._group = group
        self._classes: dict[str, type[nn.Module]] = {}
        self._installed: dict[str, metadata.EntryPoint] | None = None

    def register(self, name: str, cls: type[nn.Module], *, exist_ok: bool = False) -> None:
        """Register the class that builds an architecture.

        Args:
            name: as in `architectures` of a config.json.
            cls: the class.
            exist_ok: whether it may replace another class.

        Raises:
            ModelError: if it is not a subclass of `nn.Module`, or another class has the name.
        """
        self.check(name, cls, exist_ok=exist_ok)
        self._classes[name] = cls

    def check(self, name: str, cls: type[nn.Module], *, exist_ok: bool = False) -> None:
        """Raise what `register` would raise."""
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise ModelError(f"architecture {name!r}: expected a class derived from nn.Module, got {cls!r}")
        known = self._classes.get(name)
        if known is not None and _origin(known) != _origin(cls) and not exist_ok:
            raise ModelError(
                f"architecture {name!r} is already taken by {'.'.join(_origin(known))}, so {'.'.join(_origin(cls))} "
                "cannot be registered: rename the class, or replace the other one with exist_ok=True"
            )

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted({*self._classes, *self._entry_points()})

    def name_of(self, cls: type[nn.Module]) -> str | None:
        """Return the name under which a class is registered, or None."""
        return next((name for name, known in self._classes.items() if known is cls), None)

    def registered_in(self, modules: Iterable[str]) -> dict[str, type[nn.Module]]:
        """Return the registered classes that these modules define, by name."""
        inside = set(modules)
        return {name: cls for name, cls in sorted(self._classes.items()) if cls.__module__ in inside}

    def find(self, name: str) -> type[nn.Module] | None:
        """Return the class of an architecture, or None.

        Raises:
            ModelError: if its entry point cannot be loaded.
        """
        if name not in self._classes and name in self._entry_points():
            point = self._entry_points()[name]
            try:
                found = point.load()
            except Exception as error:
                raise ModelError(f"{_described(point)} cannot be loaded: {in_brief(error)}") from error
            if not (isinstance(found, type) and issubclass(found, nn.Module)):
                raise ModelError(f"{_described(point)} must name a class derived from nn.Module, as 'package.module:Class'")
            self.register(name, found)
        return self._classes.get(name)

    def find_by_type(self, model_type: str) -> type[nn.Module] | None:
        """Return the class for a `model_type`, by name or `config_class.model_type`; of several the causal one.

        Raises:
            ModelError: if several still fit.
        """
        wanted = _letters(model_type)
        fitting = [name for name in self.names() if _letters(model_type_of(name)) == wanted]
        fitting = fitting or [
            name for name, cls in self._classes.items()
            if getattr(getattr(cls, "config_class", None), "model_type", None) == model_type
        ]  # fmt: skip
        causal = [name for name in fitting if name.endswith(("ForCausalLM", "LMHeadModel"))]
        if len(causal or fitting) > 1:
            raise ModelError(
                f"model_type {model_type!r} fits several registered classes ({', '.join(fitting)}); say which with "
                f'"architectures": ["{fitting[0]}"] in its config'
            )
        return self.find((causal or fitting)[0]) if fitting else None

    def _entry_points(self) -> dict[str, metadata.EntryPoint]:
        if self._installed is None:
            found: dict[str, metadata.EntryPoint] = {}
            for point in metadata.entry_points(group=self._group) if self._group else ():
                other = found.setdefault(point.name, point)
                if other.value != point.value:
                    raise ModelError(f"{_described(other)} and {_described(point)} share a name; uninstall one of them")
            self._installed = found
        return self._installed


ARCHITECTURES = Registry(GROUP)
"""The registry that `af.AutoModel` searches before it asks transformers."""


def known_architectures() -> list[str]:
    """Return the names of all registered architectures, including installed packages', excluding transformers' own."""
    return ARCHITECTURES.names()


@overload
def register_architecture(name: ModelClass) -> ModelClass: ...
@overload
def register_architecture(
    name: str | None = None, *, exist_ok: bool = False
) -> Callable[[ModelClass], ModelClass]: ...  # fmt: skip
def register_architecture(name: object = None, *, exist_ok: bool = False) -> object:
    """Register a model class whatever its name; a decorator, used with or without arguments.

    Args:
        name: as in `architectures` of a config.json; by default the name of the class.
        exist_ok: whether it may replace another class.

    Raises:
        ModelError: if another class has the name.

    Example:
        @af.register_architecture("MyArch")
        class Decoder(nn.Module): ...
    """
    if isinstance(name, type):
        ARCHITECTURES.register(name.__name__, name, exist_ok=exist_ok)
        return name

    def decorate(cls: ModelClass) -> ModelClass:
        ARCHITECTURES.register(cls.__name__ if name is None else str(name), cls, exist_ok=exist_ok)
        return cls

    return decorate


def _origin(cls: type) -> tuple[str, str]:
    """Return the (module, name) that define a class; equal after its module is reloaded."""
    return cls.__module__, cls.__qualname__


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _described(point: metadata.EntryPoint) -> str:
    owner = f" of {point.dist.name}" if point.dist is not None else ""
    return f"entry point {point.name} = {point.value!r}{owner}"

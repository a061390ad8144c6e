"""`af.register_modeling_path`: import a module, a package or a file, and register the models it defines."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from autofunc.automodel.registry import ARCHITECTURES, follows_convention
from autofunc.errors import AutofuncError, ConfigError, ModelError, in_brief, one_of
from autofunc.source_file import load_file


def register_modeling_path(path: str | Path, *, exist_ok: bool = False) -> list[str]:
    """Import code and register its model classes, for `af.AutoModel` to find by name.

    This registers subclasses of `nn.Module` that a module defines itself and names like models (`MyCustomForCausalLM`,
    `MyCustomForSequenceClassification`, `MyCustomModel`), the class or list of classes it calls `ModelClass`, and those
    decorated with `af.register_architecture`.

    Args:
        path: a dotted module (`my_models.custom_llm`), also looked up in the working directory; a package, with all its
            modules; or `path/to/file.py`.
        exist_ok: whether a class may replace another of the same name.

    Returns:
        The names of the architectures.

    Raises:
        ModelError: if it cannot be imported, has no models, or reuses the name of another class.

    Example:
        af.register_modeling_path("my_models.custom_llm")
        module = af.AutoModel.from_config({"architectures": ["MyCustomForCausalLM"], "hidden_size": 64})
    """
    given = str(path)
    modules = [_file(given)] if given.endswith(".py") else _import_all(given)
    found = ARCHITECTURES.registered_in(module.__name__ for module in modules)  # decorated classes
    decorated = set(found.values())
    for cls in (cls for module in modules for cls in _models_in(module, given) if cls not in decorated):
        other = found.setdefault(cls.__name__, cls)
        if other is not cls:
            raise ModelError(
                f"{given} has two classes {cls.__name__}, in {other.__module__} and in {cls.__module__}; rename one"
            )
    if not found:
        classes = [name for module in modules for name, _ in _own_classes(module)]
        raise ModelError(
            f"{given} has no model: expected a class derived from nn.Module that is named like MyCustomForCausalLM, a "
            "ModelClass attribute, or a class decorated with @af.register_architecture. "
            + (f"It defines {', '.join(classes[:8])}" if classes else "It defines no nn.Module at all")
        )
    for name, cls in found.items():  # check all of them before registering any
        ARCHITECTURES.check(name, cls, exist_ok=exist_ok)
    for name, cls in found.items():
        ARCHITECTURES.register(name, cls, exist_ok=exist_ok)
    return sorted(found)


def _file(given: str) -> ModuleType:
    try:
        return load_file(Path(given))
    except ConfigError as error:
        raise ModelError(f"register_modeling_path: {error}") from error


def _own_classes(module: ModuleType) -> list[tuple[str, type[nn.Module]]]:
    return [
        (name, cls) for name, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, nn.Module) and cls.__module__ == module.__name__
    ]  # fmt: skip


def _models_in(module: ModuleType, given: str) -> list[type[nn.Module]]:
    named = [cls for _, cls in _own_classes(module) if follows_convention(cls.__name__)]
    stated: Any = getattr(module, "ModelClass", ())
    listed = list(stated) if isinstance(stated, Iterable) and not isinstance(stated, type) else [stated]
    for cls in listed:
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise ModelError(f"{given}: ModelClass is {cls!r}; expected a class derived from nn.Module, or a list of them")
    return list(dict.fromkeys([*named, *listed]))


def _import_all(name: str) -> list[ModuleType]:
    """Import a module, and if it is a package all modules below it."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    top = _import(name)
    below = pkgutil.walk_packages(top.__path__, name + ".") if hasattr(top, "__path__") else ()
    return [top, *(_import(each.name) for each in below if not each.name.endswith(".__main__"))]


def _import(name: str) -> ModuleType:
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except AutofuncError:
        raise
    except (ModuleNotFoundError, ValueError, TypeError) as error:
        missing = getattr(error, "name", None)
        if isinstance(error, ModuleNotFoundError) and missing and not (name == missing or name.startswith(missing + ".")):
            raise ModelError(f"importing {name} failed: {error}") from error
        raise ModelError(
            f"there is no module {name!r}: expected a dotted module or package, such as 'my_models.custom_llm', or "
            f"'path/to/file.py'; {one_of(name, _neighbours(name))}"
        ) from error
    except Exception as error:
        raise ModelError(f"importing {name} failed: {in_brief(error)}") from error


def _neighbours(name: str) -> list[str]:
    """Return the modules where one was expected: in its package, or in the working directory."""
    parent, _, _ = name.rpartition(".")
    package = sys.modules.get(parent)
    places = list(getattr(package, "__path__", [])) if package is not None else [str(Path.cwd())]
    prefix = f"{parent}." if package is not None else ""
    return sorted(prefix + each.name for each in pkgutil.iter_modules(places))

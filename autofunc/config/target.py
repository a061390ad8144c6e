"""`_target_`: from a name in a configuration to the object it names, and to what calling it returns."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from autofunc.errors import AutofuncError, ConfigError, full_message, one_of
from autofunc.source_file import load_file


def resolve_target(target: str, where: str) -> Callable[..., Any]:
    """The callable that a key such as `_target_` names, see `import_object`.

    Raises:
        ConfigError: when it is missing, or is not callable.
    """
    found = import_object(target, where)
    if not callable(found):
        raise ConfigError(f"{where}: {target!r} is {type(found).__name__}, which cannot be called")
    return found  # type: ignore[no-any-return]


def import_object(target: str, where: str) -> Any:
    """What a name in a configuration stands for: a dotted path, or `path/to/file.py:name`.

    Dotted paths are also looked for in the working directory, after everything that is installed.

    Args:
        target: the name.
        where: the key, for messages.

    Raises:
        ConfigError: when the file, module or name is missing.
    """
    if ".py:" in target:
        file, _, name = target.partition(".py:")
        try:
            module, dotted = load_file(Path(file + ".py")), name
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
    else:
        module, dotted = _import_longest(target, where)
    found: Any = module
    for part in dotted.split("."):
        if not hasattr(found, part):
            public = [known for known in dir(found) if not known.startswith("_")]
            hint = _hidden_folder_hint(target.split(".")[0])
            raise ConfigError(f"{where}: {target!r}: {found.__name__} has no {part!r}; {one_of(part, public)}{hint}")
        found = getattr(found, part)
    return found


def instantiate(node: Mapping[str, Any], where: str) -> Any:
    """Call a section's target with its other keys; sections with a `_target_` in it, in lists too, are instantiated first.

    Args:
        node: the section.
        where: its name, for messages.

    Raises:
        ConfigError: for arguments the target does not take or lacks, or when the call fails.
    """
    target = resolve_target(node["_target_"], f"{where}._target_")
    arguments = {key: _nested(value, f"{where}.{key}") for key, value in node.items() if key != "_target_"}
    check_arguments(target, arguments, where, node["_target_"])
    try:
        return target(**arguments)
    except AutofuncError as error:
        raise ConfigError(f"{where}: {full_message(error)}") from error
    except Exception as error:
        told = f"{type(error).__name__}: {full_message(error)}"
        raise ConfigError(f"{where}: {node['_target_']} failed: {told}") from error


def check_arguments(
    target: Callable[..., Any], arguments: Mapping[str, Any], where: str, name: str, given_later: int = 0
) -> None:
    """Compare arguments with the target's signature.

    Args:
        target: what will be called.
        arguments: keyword arguments.
        where: the section, for messages.
        name: of the target, for messages.
        given_later: how many leading arguments the caller passes itself.

    Raises:
        ConfigError: for an unknown argument (with the nearest known ones) or a missing one.
    """
    try:
        parameters = list(inspect.signature(target).parameters.values())[given_later:]
    except (TypeError, ValueError):
        return  # built in C, without a signature: the call itself will tell
    by_name = {parameter.name: parameter for parameter in parameters}
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    known = [
        key
        for key, parameter in by_name.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    for key in arguments:
        if key not in known and not takes_any:
            raise ConfigError(f"unknown key {where + '.' + key!r}: {name} has no such argument; {one_of(key, known)}")
    missing = [key for key in known if by_name[key].default is inspect.Parameter.empty and key not in arguments]
    if missing:
        raise ConfigError(f"missing key {where + '.' + missing[0]!r}: {name} needs {', '.join(missing)}")


def _nested(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        if "_target_" in value:
            return instantiate(value, where)
        return {key: _nested(entry, f"{where}.{key}") for key, entry in value.items()}
    if isinstance(value, list):
        return [_nested(entry, f"{where}[{number}]") for number, entry in enumerate(value)]
    return value


def _import_longest(target: str, where: str) -> tuple[Any, str]:
    """Import the longest prefix of a dotted path that is a module; returns it and the rest of the path."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    parts = target.split(".")
    for count in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:count])
        try:
            return importlib.import_module(name), ".".join(parts[count:])
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
                raise ConfigError(f"{where}: importing {name!r} failed: {error}") from error
        except Exception as error:
            raise ConfigError(f"{where}: importing {name!r} failed: {type(error).__name__}: {error}") from error
    raise ConfigError(
        f"{where}: {target!r} cannot be imported: expected a dotted path to a callable, such as "
        f"'stages.gpt2.build_gpt2_model', or 'path/to/file.py:name'.{_hidden_folder_hint(parts[0])}"
    )


def _hidden_folder_hint(package: str) -> str:
    """What to do about a folder of the user's that has the name of an installed package."""
    own, installed = Path.cwd() / package, sys.modules.get(package)
    if installed is None or not own.is_dir() or str(own) in list(getattr(installed, "__path__", [])):
        return ""
    return f". Your folder {package}/ is hidden by the installed package of that name: rename it, or use 'file.py:name'."
